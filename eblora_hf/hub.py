"""
The published sequence on the Hub: one commit and one tag per task, never over somebody else's; loading and verifying.
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import tenacity
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.utils import logging

from .composition import concatenate, folded_config, heads_of, load_adapter
from .sequence import INDEX, SUBSPACE, PublishedSequence, TaskRecord

logger = logging.get_logger(__name__)

_FILES = [INDEX, "adapter_config.json", "adapter_model.safetensors", "tasks/*"]


class SequenceConflictError(RuntimeError):
    """The sequence on the Hub has tasks that this one does not: somebody else appended to it."""


def push_sequence(
    sequence: PublishedSequence,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    push_bases: bool | str = True,
    card: Callable[[PublishedSequence, str], str] | None = None,
) -> str:
    """
    Pushes the tasks that the Hub does not have yet: per task one atomic commit, then the tag `task-NN-<name>`.

    Nothing but the sequence is pushed: no checkpoints, no optimizer, no `training_args.bin`. Rate limits, server
    errors and time-outs are retried with back-off.

    Args:
        sequence ([`PublishedSequence`]): The local sequence.
        repo_id (`str`): The repository; it is created if need be.
        token (`str`, *optional*): By default the one that is logged in.
        private (`bool`, *optional*): Whether a repository created here is private.
        revision (`str`, *optional*): Branch to push to, by default `main`.
        push_bases (`bool` or `str`, defaults to `True`): Push the bases too; `False` keeps them local, a repository id
            pushes them to that private repository. Gradient subspaces can leak training data.
        card (`Callable`, *optional*): Makes the text of `README.md` from the sequence after a task, and the repository
            id.

    Returns:
        `str`: The full repository id.

    Raises:
        SequenceConflictError: if the sequence on the Hub is not the beginning of this one; nothing is pushed then.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses, or still fails after the retries.
    """
    api, branch = HfApi(token=token), revision or "main"
    repo_id = check_remote(sequence, repo_id, token=token, private=private, revision=revision)
    if isinstance(push_bases, str):
        _push_bases(api, sequence, push_bases)
    where = "included" if push_bases is True else push_bases or "withheld"
    public = PublishedSequence(sequence.folder, sequence.base_model, sequence.tasks, bases=where)
    head, known = _remote_state(api, repo_id, branch)
    for count in range(len(known) + 1, len(sequence.tasks) + 1):
        task = sequence.tasks[count - 1]
        files = {
            name: sequence.folder / name for name in task.files if push_bases is True or not name.endswith(SUBSPACE)
        }
        files |= public.state_after(count)
        if card is not None:
            so_far = PublishedSequence(sequence.folder, sequence.base_model, sequence.tasks[:count], bases=where)
            files["README.md"] = card(so_far, repo_id).encode()
        head = _commit(api, repo_id, branch, head, files, f"Add {_tag_of(count, task)}")
        logger.info(f"Pushed the task {task.name!r} to {repo_id} ({head}).")
    _tag(api, repo_id, branch, sequence.tasks)
    return repo_id


def check_remote(
    sequence: PublishedSequence,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """
    Creates the repository and branch if need be, and checks that the sequence there is the beginning of this one.

    Args and errors are those of [`push_sequence`].

    Returns:
        `str`: The full repository id.
    """
    api = HfApi(token=token)
    repo_id = _retried(api.create_repo, repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        _retried(api.create_branch, repo_id, branch=revision, exist_ok=True)
    for index, theirs in enumerate(_remote_state(api, repo_id, revision or "main")[1]):
        ours = sequence.tasks[index] if index < len(sequence.tasks) else None
        if ours is None or ours.files != theirs.files:
            raise SequenceConflictError(
                f"{repo_id} has the task {theirs.name!r} at position {index}, the sequence in {sequence.folder} has "
                f"{'none' if ours is None else repr(ours.name) + ' with other files'}: somebody else appended to it, "
                f"or it is another sequence. Nothing was pushed. Continue from theirs with `sequence={repo_id!r}`, "
                "or push to another repository."
            )
    return repo_id


def fetch_sequence(
    source: str | Path, *, token: str | None = None, revision: str | None = None, folder: str | Path | None = None
) -> PublishedSequence:
    """
    Opens a sequence from a folder or the Hub, and verifies all its files.

    Args:
        source (`str` or `Path`): A folder that holds a sequence, or a repository id.
        token (`str`, *optional*), revision (`str`, *optional*): For the Hub; a tag is the state after that task.
        folder (`str` or `Path`, *optional*): Copy the sequence there, with its bases from their own repository if they
            have one, to continue it.

    Raises:
        FileNotFoundError: if there is no sequence.
        ValueError: if a file was changed; the message names it.
    """
    if PublishedSequence.exists(source):
        return PublishedSequence.open(
            source if folder is None else PublishedSequence.open(source).copy_to(folder).folder
        )
    if Path(source).is_dir() or str(source).count("/") > 1 or str(source).startswith((".", "/")):
        raise FileNotFoundError(f"{source} holds no sequence: there is no {INDEX} in it.")
    fetched = _retried(
        snapshot_download, str(source), revision=revision, token=token, local_dir=folder, allow_patterns=_FILES
    )
    if not PublishedSequence.exists(fetched):
        raise FileNotFoundError(f"The repository {source} holds no sequence: there is no {INDEX} in it.")
    sequence = PublishedSequence.open(fetched)
    if folder is not None and sequence.bases_at not in ("included", "withheld"):
        bases = [f"{task.folder}/{SUBSPACE}" for task in sequence.tasks]
        _retried(snapshot_download, sequence.bases_at, token=token, local_dir=folder, allow_patterns=bases)
        sequence.bases_at = "included"
        sequence.write_root()
        sequence = PublishedSequence.open(folder)
    return sequence


def load_sequence(
    base_model: nn.Module,
    source: str | Path,
    *,
    upto: str | None = None,
    exclude: Collection[str] = (),
    head: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> PeftModel:
    """
    Puts a published sequence, or a part of it, on its base model as one LoRA adapter.

    Args:
        base_model (`nn.Module`): The model the sequence was learnt on.
        source (`str` or `Path`): A folder, or a repository id on the Hub.
        upto (`str`, *optional*): Last task to take: the model after that task.
        exclude (collection of `str`, *optional*): Tasks to leave out.
        head (`str`, *optional*): Task whose `modules_to_save` to use instead of the newest task's.
        revision (`str`, *optional*), token (`str`, *optional*): For the Hub.

    Returns:
        `PeftModel`: In evaluation mode.

    Raises:
        ValueError: if a file was changed, the base model is another one, or a name is unknown.
    """
    sequence = fetch_sequence(source, token=token, revision=revision)
    sequence.check_base_model(base_model)
    adapter = concatenate(sequence.adapters(sequence.select(upto, exclude)))
    if head is not None:
        adapter |= heads_of(sequence.adapters(sequence.select(head)[-1:])[0])
    model = get_peft_model(base_model, folded_config(sequence.config(), adapter))
    load_adapter(model, "default", adapter)
    return model.eval()


def _push_bases(api: HfApi, sequence: PublishedSequence, repo_id: str) -> None:
    """All bases in a private repository of their own, one commit per push."""
    repo_id = _retried(api.create_repo, repo_id, private=True, exist_ok=True).repo_id
    head = _retried(api.repo_info, repo_id).sha
    files = {name: sequence.folder / name for task in sequence.tasks for name in task.files if name.endswith(SUBSPACE)}
    present = set(_retried(api.list_repo_files, repo_id))
    files = {name: path for name, path in files.items() if name not in present}
    if files:
        _commit(api, repo_id, "main", head, files, f"Add bases of {len(files)} task(s)")


def _remote_state(api: HfApi, repo_id: str, branch: str) -> tuple[str, list[TaskRecord]]:
    """The head of the branch and the tasks of the sequence there."""
    head = _retried(api.repo_info, repo_id, revision=branch).sha
    try:
        path = _retried(api.hf_hub_download, repo_id, INDEX, revision=head)
    except EntryNotFoundError:
        return head, []
    return head, [TaskRecord(**task) for task in json.loads(Path(path).read_text(encoding="utf-8"))["tasks"]]


def _commit(api: HfApi, repo_id: str, branch: str, parent: str, files: dict[str, bytes | Path], message: str) -> str:
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    try:
        info = _retried(
            api.create_commit, repo_id, operations, commit_message=message, revision=branch, parent_commit=parent
        )
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (409, 412):
            raise SequenceConflictError(
                f"{repo_id} changed while {message!r} was being pushed: somebody else appended to it. Nothing of "
                "theirs was overwritten. Push again; if their task is in the way, the next error says what to do."
            ) from error
        raise
    return info.oid


def _tag(api: HfApi, repo_id: str, branch: str, tasks: list[TaskRecord]) -> None:
    """Tags the commit of every task that has no tag yet, also of those whose push was interrupted before it."""
    present = {tag.name for tag in _retried(api.list_repo_refs, repo_id).tags}
    wanted = [_tag_of(count, task) for count, task in enumerate(tasks, start=1)]
    if set(wanted) <= present:
        return
    commits = {commit.title: commit.commit_id for commit in _retried(api.list_repo_commits, repo_id, revision=branch)}
    for tag in wanted:
        if tag not in present and f"Add {tag}" in commits:
            _retried(api.create_tag, repo_id, tag=tag, revision=commits[f"Add {tag}"], exist_ok=True)


def _tag_of(count: int, task: TaskRecord) -> str:
    return f"task-{count - 1:02d}-{task.name}"


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, RepositoryNotFoundError | EntryNotFoundError):
        return False
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code == 429 or error.response.status_code >= 500
    # time-outs and broken connections; by name, since huggingface_hub 1 and 2 build on different HTTP clients
    return any(cls.__name__ == "TransportError" for cls in type(error).__mro__)


_retry = tenacity.Retrying(
    retry=tenacity.retry_if_exception(_is_transient),
    wait=tenacity.wait_random_exponential(multiplier=1, max=30),
    stop=tenacity.stop_after_attempt(6),
    before_sleep=lambda state: logger.warning(f"The Hub failed ({state.outcome.exception()}); trying again."),
    reraise=True,
)


def _retried(function: Callable, *args: Any, **kwargs: Any) -> Any:
    return _retry(function, *args, **kwargs)
