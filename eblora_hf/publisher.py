"""Pushing a sequence while it is being learnt, as the Hub options of `TrainingArguments` say."""

from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from transformers import TrainingArguments
from transformers.utils import logging

from .card import render_card
from .hub import SequenceConflictError, check_remote, push_sequence
from .sequence import PublishedSequence

logger = logging.get_logger(__name__)


class Publisher:
    """
    Pushes a sequence to one repository. A push that fails never loses the local task: the next one makes up for it.

    Args:
        repo_id (`str`): The repository.
        token (`str`, *optional*), private (`bool`, *optional*), revision (`str`, *optional*), push_bases (`bool` or
        `str`):
            As in [`push_sequence`].
        every_task (`bool`): Push after every task, not only at the end (`hub_strategy="end"`).
    """

    def __init__(
        self,
        repo_id: str,
        token: str | None,
        private: bool | None,
        revision: str | None,
        push_bases: bool | str,
        every_task: bool,
    ):
        self.repo_id, self.token, self.private, self.revision = repo_id, token, private, revision
        self.push_bases, self.every_task = push_bases, every_task
        self.failure: Exception | None = None

    @classmethod
    def from_arguments(cls, args: TrainingArguments | None, push_bases: bool | str = True) -> "Publisher | None":
        """The publisher that the arguments ask for, or `None` without `push_to_hub`."""
        if args is None or not args.push_to_hub:
            return None
        every_task = str(getattr(args.hub_strategy, "value", args.hub_strategy)) != "end"
        repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
        return cls(repo_id, args.hub_token, args.hub_private_repo, args.hub_revision, push_bases, every_task)

    @classmethod
    def for_folder(cls, args: TrainingArguments) -> "Publisher":
        """The publisher of a call to `trainer.push_to_hub()` without `push_to_hub` in the arguments."""
        repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
        return cls(repo_id, args.hub_token, args.hub_private_repo, args.hub_revision, True, False)

    def prepare(self, sequence: PublishedSequence) -> None:
        """Creates the repository and raises if pushing is refused or would overwrite somebody else's tasks."""
        self.repo_id = check_remote(
            sequence, self.repo_id, token=self.token, private=self.private, revision=self.revision
        )

    def publish(self, sequence: PublishedSequence) -> None:
        """Pushes after a task. A failure is logged and kept for `finish`, so that learning goes on."""
        if not self.every_task:
            return
        try:
            self.push(sequence)
            self.failure = None
        except (HfHubHTTPError, OSError, SequenceConflictError) as error:
            self.failure = error
            logger.error(f"The push to {self.repo_id} failed; the task is safe in {sequence.folder}. {error}")

    def finish(self, sequence: PublishedSequence) -> None:
        """
        Pushes what is not on the Hub yet.

        Raises:
            RuntimeError: if that fails: everything is learnt and saved, but not published.
        """
        if self.every_task and self.failure is None:
            return
        try:
            self.push(sequence)
        except (HfHubHTTPError, OSError, SequenceConflictError) as error:
            raise RuntimeError(
                f"All tasks are learnt and saved in {sequence.folder}, but they could not be pushed to "
                f"{self.repo_id}: {error} Once that is mended, call `trainer.push_to_hub()`."
            ) from error

    def push(self, sequence: PublishedSequence, token: str | None = None, revision: str | None = None) -> str:
        """Pushes now; returns the repository id."""
        return push_sequence(
            sequence,
            self.repo_id,
            token=token or self.token,
            private=self.private,
            revision=revision or self.revision,
            push_bases=self.push_bases,
            card=render_card,
        )
