"""Pushing a sequence while it is being learnt, as the Hub options of `TrainingArguments` say."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments
from transformers.utils import logging

from ..metrics import continual_metrics, unmeasured
from ..published.card import render_card
from ..published.files import write
from ..published.hub import check_remote, push_sequence
from ..published.requests import is_unanswered
from ..published.sequence import PublishedSequence
from .companions import write_processing_class
from .surface import TrainerSurface

logger = logging.get_logger(__name__)


class Publisher:
    """
    Pushes a sequence to one repository, on the process that writes, in the background while training goes on. A push
    that fails never loses the local task: the next one makes up for it.

    Args:
        args (`TrainingArguments`): `push_to_hub` and the `hub_*` options. With `hub_strategy="end"` the sequence is
            pushed once at the end, else after every task.
        push_bases (`bool` or `str`, *optional*): As in [`push_sequence`].
    """

    def __init__(self, args: TrainingArguments, push_bases: bool | str | None):
        self._args, self._wanted = args, args.push_to_hub
        self.every_task = str(getattr(args.hub_strategy, "value", args.hub_strategy)) != "end"
        self.repo_id = args.hub_model_id or Path(str(args.output_dir)).resolve().name
        self.token, self.private, self.revision = args.hub_token, args.hub_private_repo, args.hub_revision
        self.push_bases = push_bases
        self.licence: str | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        self._running: Future | None = None

    @property
    def automatic(self) -> bool:
        return self._wanted and self._args.should_save

    def prepare(self, sequence: PublishedSequence) -> None:
        """
        Creates the repository and raises if pushing is refused or would overwrite somebody else's tasks. A Hub that
        does not answer does not stop training.
        """
        if not self.automatic:
            return
        try:
            self.repo_id = check_remote(
                sequence, self.repo_id, token=self.token, private=self.private, revision=self.revision
            )
        except Exception as error:
            if not is_unanswered(error):
                raise
            logger.warning(f"The Hub does not answer ({error}). Training begins; it is asked again after the task.")

    def publish(self, sequence: PublishedSequence) -> None:
        """Begins a push after a task, unless the one before still runs: the next makes up for it."""
        if not self.automatic or not self.every_task or (self._running is not None and not self._running.done()):
            return
        self._running = self._pool.submit(self._try, sequence.part(sequence.tasks))

    def _try(self, sequence: PublishedSequence) -> Exception | None:
        """Pushes; returns what went wrong, which is logged, so that learning goes on."""
        try:
            self._push(sequence, None, None)
        except Exception as error:  # whatever the network does
            logger.error(f"The push to {self.repo_id} failed; the task is safe in {sequence.folder}. {error}")
            return error
        return None

    def finish(self, sequence: PublishedSequence) -> None:
        """
        Pushes what is not on the Hub yet. If the Hub does not answer, it is given up with a warning.

        Raises:
            RuntimeError: if that fails: everything is learnt and saved, but not published.
        """
        if not self.automatic or not sequence.tasks:
            return
        error = self._wait()
        if not is_unanswered(error):
            try:
                self._push(sequence, None, None)
                return
            except Exception as failure:
                error = failure
        message = (
            f"All tasks are learnt and saved in {sequence.folder}, but they could not be pushed to {self.repo_id}: "
            f"{error} Once that is mended, call `trainer.push_to_hub()`."
        )
        if not is_unanswered(error):
            raise RuntimeError(message) from error
        logger.warning(message)

    def write_card(self, sequence: PublishedSequence) -> None:
        """Writes the card beside the adapter."""
        write(sequence.folder / "README.md", render_card(sequence, self.repo_id, self.licence).encode())

    def push(self, sequence: PublishedSequence, token: str | None = None, revision: str | None = None) -> str:
        """Pushes now; returns the repository id."""
        self._wait()
        return self._push(sequence, token, revision)

    def _wait(self) -> Exception | None:
        """What became of the push in the background, if there is one."""
        running, self._running = self._running, None
        return None if running is None else running.result()

    def _push(self, sequence: PublishedSequence, token: str | None, revision: str | None) -> str:
        return push_sequence(
            sequence,
            self.repo_id,
            token=token or self.token,
            private=self.private,
            revision=revision or self.revision,
            push_bases=self.push_bases,
            card=render_card,
            licence=self.licence,
        )


class PublishingMixin(TrainerSurface):
    """
    What a `Trainer` shows and publishes of its sequence, instead of its checkpoints and arguments.

    Attributes:
        publisher ([`Publisher`]): Where the sequence goes.
    """

    publisher: Publisher

    @property
    def accuracy_matrix(self) -> np.ndarray:
        """R[t][i], the accuracy on task i after learning task t; NaN where it was not measured."""
        return np.zeros((0, 0)) if self.task_callback is None else self.task_callback.accuracy_matrix()

    @property
    def root_accuracy_matrix(self) -> np.ndarray:
        """
        The same with the head that the root carries after each task: what plain PEFT gives. It differs where tasks
        train `modules_to_save`; with heads="per-task" there is none for earlier tasks, and their entries are NaN.
        """
        return np.zeros((0, 0)) if self.task_callback is None else self.task_callback.root_accuracy_matrix()

    def continual_metrics(self) -> dict[str, float]:
        """MFN, MAA, LA, BWT, FWT and transfer of the accuracy matrix; empty before the first task is finished."""
        matrix = self.accuracy_matrix
        if not matrix.size:
            return {}
        left_out = unmeasured(self.begun.sequence.names, matrix)
        if left_out and not np.isnan(matrix).all():
            logger.warning(f"Not all of {', '.join(left_out)} was measured: means are over what was.")
        return continual_metrics(matrix)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        *args: Any,
        license: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Pushes the sequence: per task that the Hub does not have yet one commit and one tag, and the model card.

        Takes the arguments of `Trainer.push_to_hub`, of which `token`, `revision` and `license` matter: commit
        messages and the card describe the tasks.

        Returns:
            `str`: The repository id; `None` on other processes than the main one.

        Raises:
            ValueError: if nothing has been learnt.
        """
        if self.task_callback is None or not self.task_callback.sequence.tasks:
            raise ValueError("There is nothing to push before `train()` has learnt a task.")
        if not self.is_world_process_zero():
            return None
        self.publisher.licence = license or self.publisher.licence
        return self.publisher.push(self.task_callback.sequence, token, revision)

    def create_model_card(self, *args, license: str | None = None, **kwargs) -> None:
        """
        Writes the card of the sequence to `args.output_dir`. Takes the arguments of the parent; `license` matters.
        """
        if self.task_callback is not None and self.task_callback.sequence.tasks and self.is_world_process_zero():
            self.publisher.licence = license or self.publisher.licence
            self.publisher.write_card(self.task_callback.sequence)

    def write_companions(self) -> None:
        """Writes what stock loaders look for beside the adapter, on the process that writes."""
        if self.args.should_save:
            write_processing_class(self.begun.sequence, self.processing_class)
            self.publisher.write_card(self.begun.sequence)

    def publish_task(self) -> None:
        """Pushes the sequence, if that was asked for, and has all processes read what one has written."""
        self.publisher.publish(self.begun.sequence)
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            self.begun.sequence = PublishedSequence.open(self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        sequence = self.task_callback and self.task_callback.sequence
        folder = Path(output_dir or self.args.output_dir).resolve()
        into = sequence if sequence and sequence.tasks and folder == sequence.folder.resolve() else None
        if into is not None:
            into.check_unchanged()  # another trainer may have gone on in this folder
        super()._save(output_dir, state_dict)
        if into is not None and self.args.should_save:
            into.write_root()  # the bytes that the index knows
