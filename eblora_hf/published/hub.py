"""
The published sequence on the Hub: one commit and one tag per task, never over somebody else's; loading and verifying.
"""

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import tenacity
from huggingface_hub import CommitOperationAdd, HfApi, metadata_load
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.utils import logging

from ..adapters.composition import concatenate, load_adapter
from ..adapters.states import folded_config, heads_of
from .index import INDEX, SUBSPACE, Index, TaskRecord
from .sequence import PublishedSequence

logger = logging.get_logger(__name__)


class SequenceConflictError(RuntimeError):
    """The sequence on the Hub has tasks that this one does not: somebody else appended to it."""


def push_sequence(
    sequence: PublishedSequence,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    push_bases: bool | str | None = None,
    card: Callable[[PublishedSequence, str, str | None], str] | None = None,
    licence: str | None = None,
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
        push_bases (`bool` or `str`, *optional*): `True` pushes the bases too, `False` keeps them local, a repository
            id pushes them to that private repository. Gradient subspaces can leak training data. By default as the
            sequence on the Hub has it, and `True` for a new one.
        card (`Callable`, *optional*): Makes the text of `README.md` from the sequence after a task, the repository id
            and the licence.
        licence (`str`, *optional*): For the card; by default the one that the card on the Hub states.

    Returns:
        `str`: The full repository id.

    Raises:
        SequenceConflictError: if the sequence on the Hub is not the beginning of this one; nothing is pushed then.
        ValueError: if the bases of the sequence on the Hub are elsewhere than `push_bases` says, or their repository
        is
            public; nothing is pushed then.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses, or still fails after the retries.
    """
    api, branch = HfApi(token=token), revision or "main"
    repo_id = check_remote(sequence, repo_id, token=token, private=private, revision=revision)
    head, remote = _remote_state(api, repo_id, branch)
    if isinstance(push_bases, str):
        where = push_bases
    elif push_bases is None:
        where = remote.bases if remote else "included"
    else:
        where = "included" if push_bases else "withheld"
    if remote is not None and remote.bases != where:
        raise ValueError(
            f"The bases of the sequence in {repo_id} are {remote.bases!r}, not {where!r} as "
            f"push_bases={push_bases!r} asks: where they are cannot change later. Leave `push_bases` out, or push to "
            "another repository."
        )
    if where not in ("included", "withheld"):
        _push_bases(api, sequence, where)
    licence = licence or _stated_licence(api, repo_id, head)
    commits = {}
    for count in range(len(remote.tasks if remote else []) + 1, len(sequence.tasks) + 1):
        task = sequence.tasks[count - 1]
        so_far = PublishedSequence(sequence.folder, sequence.base_model, sequence.tasks[:count], bases=where)
        files: dict[str, bytes | Path] = {
            name: sequence.folder / name for name in task.files if where == "included" or not name.endswith(SUBSPACE)
        }
        files |= so_far.state_after(count)
        if card is not None:
            files["README.md"] = card(so_far, repo_id, licence).encode()
        head = _commit(api, so_far, repo_id, branch, head, files)
        commits[_tag_of(count, task)] = head
        logger.info(f"Pushed the task {task.name!r} to {repo_id} ({head}).")
    _tag(api, repo_id, branch, sequence.tasks, commits)
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
    remote = _remote_state(api, repo_id, revision or "main")[1]
    check_beginning(remote.tasks if remote else [], sequence, repo_id)
    return repo_id


def check_beginning(theirs: list[TaskRecord], ours: PublishedSequence, source: str | Path) -> None:
    """
    Raises if the tasks of `source` are not the first tasks of `ours`.

    Raises:
        SequenceConflictError: naming the first task that differs.
    """
    for index, task in enumerate(theirs):
        own = ours.tasks[index] if index < len(ours.tasks) else None
        if own is None or own.files != task.files:
            raise SequenceConflictError(
                f"{source} has the task {task.name!r} at position {index}, the sequence in {ours.folder} has "
                f"{'none' if own is None else repr(own.name) + ' with other files'}: somebody else appended to it, "
                f"or it is another sequence. Nothing was pushed. Continue from theirs in a new folder with "
                f"`sequence={str(source)!r}`, or use another repository."
            )


def fetch_sequence(
    source: str | Path, *, token: str | None = None, revision: str | None = None, folder: str | Path | None = None
) -> PublishedSequence:
    """
    Opens a sequence from a folder or the Hub, and verifies all its files.

    Args:
        source (`str` or `Path`): A folder that holds a sequence, or `"user/repo"` or `"user/repo@revision"` on the
            Hub.
        token (`str`, *optional*), revision (`str`, *optional*): For the Hub; a tag is the state after that task.
        folder (`str` or `Path`, *optional*): Copy the sequence there, with its bases from their own repository if they
            have one, to continue it. The index is copied last: a copy that was killed counts as none.

    Raises:
        FileNotFoundError: if there is no sequence.
        ValueError: if a file was changed, the message names it; or for a `revision` of a folder.
    """
    if PublishedSequence.exists(source):
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for the Hub, but {source} is a folder. Use `upto=` for a part of it."
            )
        sequence = PublishedSequence.open(source)
        return sequence if folder is None else sequence.copy_to(folder)
    repo_id, _, at = str(source).partition("@")
    if Path(source).is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id) or repo_id.startswith("."):
        raise FileNotFoundError(f"{source} holds no sequence: there is no {INDEX} in it.")
    api = HfApi(token=token)
    commit, remote = _remote_state(api, repo_id, revision or at or "main")
    if remote is None:
        raise FileNotFoundError(f"The repository {source} holds no sequence: there is no {INDEX} in it.")
    files = [INDEX, *remote.files, *(name for task in remote.tasks for name in task.files)]
    fetched = _retried(api.snapshot_download, repo_id, revision=commit, allow_patterns=files)
    sequence = PublishedSequence.open(fetched)
    if folder is None:
        return sequence
    bases = None
    if remote.bases not in ("included", "withheld"):
        bases = _retried(
            api.snapshot_download, remote.bases, allow_patterns=[f for f in files if f.endswith(SUBSPACE)]
        )
    return sequence.copy_to(folder, bases)


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
    sequence.check_adapters(base_model)
    adapter = concatenate(sequence.adapters(sequence.select(upto, exclude)))
    if head is not None:
        heads = heads_of(sequence.adapters(sequence.select(head)[-1:])[0])
        if not heads:
            raise ValueError(f"The task {head!r} has no head of its own: it trained no `modules_to_save`.")
        adapter |= heads
    model = get_peft_model(base_model, folded_config(sequence.config(), adapter))
    load_adapter(model, "default", adapter)
    return model.eval()


def _push_bases(api: HfApi, sequence: PublishedSequence, repo_id: str) -> None:
    """All bases in a private repository of their own, one commit per push."""
    repo_id = _retried(api.create_repo, repo_id, private=True, exist_ok=True).repo_id
    info = _retried(api.repo_info, repo_id)
    if not info.private:
        raise ValueError(f"The repository {repo_id} for the bases is public. Make it private, or name another.")
    wanted = {
        name: digest for task in sequence.tasks for name, digest in task.files.items() if name.endswith(SUBSPACE)
    }
    present = {file.path: file for file in _retried(api.get_paths_info, repo_id, list(wanted), revision=info.sha)}
    for name, file in present.items():
        if file.lfs is None or file.lfs.sha256 != wanted[name]:
            raise SequenceConflictError(
                f"{repo_id} has another {name}: it holds the bases of another sequence. Nothing was pushed. Name "
                "another repository in `push_bases`."
            )
    operations = [CommitOperationAdd(name, sequence.folder / name) for name in wanted if name not in present]
    if operations:
        message = f"Add the bases of {len(operations)} task(s)"
        _retried(api.create_commit, repo_id, operations, commit_message=message, parent_commit=info.sha)


def _remote_state(api: HfApi, repo_id: str, revision: str) -> tuple[str, Index | None]:
    """The commit at a revision and the index there, `None` only if the repository really has none."""
    commit = _retried(api.repo_info, repo_id, revision=revision).sha
    if INDEX not in _retried(api.list_repo_files, repo_id, revision=commit):
        return commit, None
    return commit, Index.read(Path(_retried(api.hf_hub_download, repo_id, INDEX, revision=commit)))


def _stated_licence(api: HfApi, repo_id: str, commit: str) -> str | None:
    """The licence that somebody wrote into the card on the Hub."""
    if "README.md" not in _retried(api.list_repo_files, repo_id, revision=commit):
        return None
    metadata = metadata_load(_retried(api.hf_hub_download, repo_id, "README.md", revision=commit)) or {}
    return metadata.get("license")


def _commit(
    api: HfApi, sequence: PublishedSequence, repo_id: str, branch: str, parent: str, files: dict[str, bytes | Path]
) -> str:
    """Commits the newest task of `sequence`; returns the commit."""
    message = f"Add {_tag_of(len(sequence.tasks), sequence.tasks[-1])}"
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    try:
        return _retried(
            api.create_commit, repo_id, operations, commit_message=message, revision=branch, parent_commit=parent
        ).oid
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (409, 412):
            raise
        head, remote = _remote_state(api, repo_id, branch)
        if remote is not None and [task.files for task in remote.tasks] == [task.files for task in sequence.tasks]:
            return head  # our own commit was taken, and only its answer was lost
        raise SequenceConflictError(
            f"{repo_id} changed while {message!r} was being pushed: somebody else appended to it. Nothing of theirs "
            "was overwritten. Push again; if their task is in the way, the next error says what to do."
        ) from error


def _tag(api: HfApi, repo_id: str, branch: str, tasks: list[TaskRecord], commits: dict[str, str]) -> None:
    """Tags the commit of every task that has no tag yet, also of those whose push was interrupted before it."""
    present = {tag.name: tag.target_commit for tag in _retried(api.list_repo_refs, repo_id).tags}
    wanted = [_tag_of(count, task) for count, task in enumerate(tasks, start=1)]
    if not set(wanted) <= set(present):
        history = _retried(api.list_repo_commits, repo_id, revision=branch)
        titles = {commit.title: commit.commit_id for commit in reversed(history)}  # the newest of a title wins
        commits = {tag: titles[f"Add {tag}"] for tag in wanted if f"Add {tag}" in titles} | commits
    for tag, commit in commits.items():
        if tag not in present:
            _retried(api.create_tag, repo_id, tag=tag, revision=commit, exist_ok=True)
        elif tag in commits and present[tag] != commit:
            logger.warning(
                f"The tag {tag!r} of {repo_id} is on the commit {present[tag]} of another branch or history."
            )


def _tag_of(count: int, task: TaskRecord) -> str:
    return f"task-{count - 1:02d}-{task.name}"


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, LocalEntryNotFoundError):  # what a failing HEAD request becomes
        return True
    if isinstance(error, RepositoryNotFoundError | EntryNotFoundError):
        return False
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code == 429 or error.response.status_code >= 500
    # time-outs and broken connections; by name, since huggingface_hub 1 and 2 build on different HTTP clients
    return any(cls.__name__ == "TransportError" for cls in type(error).__mro__)


def _say_that_it_is_tried_again(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome is not None else None
    logger.warning(f"The Hub failed ({error}); trying again.")


_retry = tenacity.Retrying(
    retry=tenacity.retry_if_exception(_is_transient),
    wait=tenacity.wait_random_exponential(multiplier=1, max=30),
    stop=tenacity.stop_after_attempt(6),
    before_sleep=_say_that_it_is_tried_again,
    reraise=True,
)


def _retried(function: Callable, *args: Any, **kwargs: Any) -> Any:
    return _retry(function, *args, **kwargs)
