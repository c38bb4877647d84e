"""Pushing a sequence to the Hub: one commit and one tag per task, never over somebody else's."""

import re
from collections.abc import Callable
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from huggingface_hub import CommitOperationAdd, metadata_load
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from .index import SUBSPACE, Index, TaskRecord
from .owner import companions_of, remember_bases, settings_of
from .remote import remote_index, remote_sizes, remote_state
from .requests import HubApi, retried
from .schema import MAX_JSON
from .sequence import PublishedSequence

logger = logging.get_logger(__name__)


class SequenceConflictError(RuntimeError):
    """The sequence on the Hub has tasks that this one does not: somebody else appended to it."""


def push_sequence(
    sequence: PublishedSequence | str | Path,
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

    Nothing but the sequence, its card and the tokenizer or processor beside it is pushed: no checkpoints, no
    optimizer, no `training_args.bin`. Rate limits, server errors and time-outs are retried with back-off.

    Args:
        sequence ([`PublishedSequence`], `str` or `Path`): The local sequence, or its folder.
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
            is public; nothing is pushed then.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses, or still fails after the retries.
    """
    if not isinstance(sequence, PublishedSequence):
        sequence = PublishedSequence.open(sequence)
    api, branch = HubApi(token=token), revision or "main"
    repo_id, head, remote = _look(api, sequence, repo_id, private=private, revision=revision)
    where = _where_bases_go(sequence, repo_id, remote, push_bases)
    if where not in ("included", "withheld"):
        _push_bases(api, sequence, where)
    remember_bases(sequence.folder, repo_id, where)
    keep_card, stated = _stated_licence(api, repo_id, head)
    licence = licence or stated
    commits = {}
    for count in range(len(remote.tasks if remote else []) + 1, len(sequence.tasks) + 1):
        task = sequence.tasks[count - 1]
        so_far = sequence.part(sequence.tasks[:count], bases=where)
        files: dict[str, bytes | Path] = {
            name: sequence.folder / name for name in task.files if where == "included" or not name.endswith(SUBSPACE)
        }
        files |= {path.relative_to(sequence.folder).as_posix(): path for path in companions_of(sequence.folder)}
        files |= so_far.state_after(count)
        if card is not None and not keep_card:
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
    return _look(HubApi(token=token), sequence, repo_id, private=private, revision=revision)[0]


def _look(
    api: HubApi, sequence: PublishedSequence, repo_id: str, *, private: bool | None, revision: str | None
) -> tuple[str, str, Index | None]:
    """
    The full repository id, the head of the branch, and the index there, which is the beginning of the sequence. What
    is pushed goes on top of that commit or not at all.
    """
    repo_id = retried(api.create_repo, repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        retried(api.create_branch, repo_id, branch=revision, exist_ok=True)
    head, remote = remote_state(api, repo_id, revision or "main")
    check_beginning(remote.tasks if remote else [], sequence, repo_id)
    return repo_id, head, remote


def _where_bases_go(
    sequence: PublishedSequence, repo_id: str, remote: Index | None, push_bases: bool | str | None
) -> str:
    """Raises a `ValueError` if they have gone elsewhere so far, by the index there or by what was kept here."""
    kept = settings_of(sequence.folder).get("bases", {}).get(repo_id)
    if isinstance(push_bases, str):
        where = push_bases
    elif push_bases is None:
        where = kept or (remote.bases if remote else "included")
    else:
        where = "included" if push_bases else "withheld"
    if remote is not None and kept is not None and remote.bases != kept:
        raise ValueError(
            f"The index in {repo_id} says that the bases are {remote.bases!r}, but from {sequence.folder} they went "
            f"{kept!r}: somebody has changed it. Nothing was pushed. Restore the index there, or push to another "
            "repository."
        )
    if remote is not None and remote.bases != where:
        raise ValueError(
            f"The bases of the sequence in {repo_id} are {remote.bases!r}, not {where!r} as "
            f"push_bases={push_bases!r} asks: where they are cannot change later. Leave `push_bases` out, or push to "
            "another repository."
        )
    return where


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


def _push_bases(api: HubApi, sequence: PublishedSequence, repo_id: str) -> None:
    """All bases in a private repository of their own, one commit per push."""
    repo_id = retried(api.create_repo, repo_id, private=True, exist_ok=True).repo_id
    info = retried(api.repo_info, repo_id)
    if not info.private:
        raise ValueError(f"The repository {repo_id} for the bases is public. Make it private, or name another.")
    wanted = {
        name: digest for task in sequence.tasks for name, digest in task.files.items() if name.endswith(SUBSPACE)
    }
    present = {file.path: file for file in retried(api.get_paths_info, repo_id, list(wanted), revision=info.sha)}
    for name, file in present.items():
        if file.lfs is None or file.lfs.sha256 != wanted[name]:
            raise SequenceConflictError(
                f"{repo_id} has another {name}: it holds the bases of another sequence. Nothing was pushed. Name "
                "another repository in `push_bases`."
            )
    operations = [CommitOperationAdd(name, sequence.folder / name) for name in wanted if name not in present]
    if operations:
        message = f"Add the bases of {len(operations)} task(s)"
        retried(api.create_commit, repo_id, operations, commit_message=message, parent_commit=info.sha)


def _stated_licence(api: HubApi, repo_id: str, commit: str) -> tuple[bool, str | None]:
    """Whether the card on the Hub is left alone, because it cannot be read, and the licence that it states."""
    size = remote_sizes(api, repo_id, commit, ["README.md"]).get("README.md")
    if size is None:
        return False, None
    try:
        if size > MAX_JSON:
            raise ValueError(f"it has {size} bytes")
        metadata = metadata_load(retried(api.hf_hub_download, repo_id, "README.md", revision=commit)) or {}
        licence = metadata.get("license")
        if licence is not None and not (isinstance(licence, str) and re.fullmatch(r"[\w.-]{1,50}", licence)):
            raise ValueError(f"its licence is {licence!r:.60}")
    except (ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:
        logger.warning(f"README.md in {repo_id} cannot be read and is left as it is: {error}")
        return True, None
    return False, licence


def _commit(
    api: HubApi, sequence: PublishedSequence, repo_id: str, branch: str, parent: str, files: dict[str, bytes | Path]
) -> str:
    """Commits the newest task of `sequence`; returns the commit."""
    message = f"Add {_tag_of(len(sequence.tasks), sequence.tasks[-1])}"
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    options = {"commit_message": message, "revision": branch, "parent_commit": parent}
    try:
        head = retried(api.create_commit, repo_id, operations, **options).oid
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (409, 412):
            raise
        head = retried(api.repo_info, repo_id, revision=branch).sha  # ours, if only its answer was lost
    # a commit that changes nothing returns whatever head there is, too: somebody else's may be on top of ours
    if not _is_ours(api, repo_id, head, sequence):
        raise SequenceConflictError(
            f"{repo_id} changed while {message!r} was being pushed: somebody else appended to it. Nothing of theirs "
            "was overwritten. Push again; if their task is in the way, the next error says what to do."
        )
    return head


def _is_ours(api: HubApi, repo_id: str, commit: str, sequence: PublishedSequence) -> bool:
    """Whether the sequence at a commit is this one."""
    remote = remote_index(api, repo_id, commit)
    return remote is not None and [task.files for task in remote.tasks] == [task.files for task in sequence.tasks]


def _tag(api: HubApi, repo_id: str, branch: str, tasks: list[TaskRecord], commits: dict[str, str]) -> None:
    """Tags the commit of every task that has no tag yet, also of those whose push was interrupted before it."""
    present = {tag.name: tag.target_commit for tag in retried(api.list_repo_refs, repo_id).tags}
    wanted = [_tag_of(count, task) for count, task in enumerate(tasks, start=1)]
    if not set(wanted) <= set(present):
        history = retried(api.list_repo_commits, repo_id, revision=branch)
        titles = {commit.title: commit.commit_id for commit in reversed(history)}  # the newest of a title wins
        commits = {tag: titles[f"Add {tag}"] for tag in wanted if f"Add {tag}" in titles} | commits
    for tag, commit in commits.items():
        if tag not in present:
            retried(api.create_tag, repo_id, tag=tag, revision=commit, exist_ok=True)
        elif tag in commits and present[tag] != commit:
            logger.warning(
                f"The tag {tag!r} of {repo_id} is on the commit {present[tag]} of another branch or history."
            )


def _tag_of(count: int, task: TaskRecord) -> str:
    return f"task-{count - 1:02d}-{task.name}"
