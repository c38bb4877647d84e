"""A published sequence from a folder or the Hub, verified, and put on its base model."""

import re
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.utils import logging

from ..adapters.composition import concatenate, load_adapter
from ..adapters.heads import name_labels
from ..adapters.states import folded_config, heads_of
from .adapter_files import fitting_task_type
from .files import write
from .index import INDEX, SUBSPACE
from .owner import remember_bases
from .remote import fetch_files, remote_state
from .requests import HubApi, is_unanswered, retried
from .sequence import PublishedSequence

logger = logging.get_logger(__name__)


class NoSequenceError(FileNotFoundError):
    """A folder or repository holds no sequence."""


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
        return sequence if folder is None else _copied(sequence, folder)
    repo_id, _, at = str(source).partition("@")
    if Path(source).is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id) or repo_id.startswith("."):
        raise NoSequenceError(f"{source} holds no sequence: there is no {INDEX} in it.")
    api, revision = HubApi(token=token), revision or at or "main"
    try:
        sequence = _download(api, repo_id, revision)
    except RepositoryNotFoundError as error:
        raise NoSequenceError(
            f"{source} is neither a folder nor a repository on the Hub that you can read."
        ) from error
    except Exception as error:
        if not is_unanswered(error):
            raise
        sequence = _cached(repo_id, revision, error)
    if folder is None:
        return sequence
    elsewhere = sequence.bases_at not in ("included", "withheld")
    bases = _download_bases(api, sequence) if elsewhere and any(task.has_basis for task in sequence.tasks) else None
    copied = _copied(sequence, folder, bases)
    remember_bases(Path(folder), repo_id, sequence.bases_at)
    return copied


def _download(api: HubApi, repo_id: str, revision: str) -> PublishedSequence:
    """The sequence at a revision, in the cache of `huggingface_hub`."""
    commit, remote = remote_state(api, repo_id, revision)
    if remote is None:
        raise NoSequenceError(f"The repository {repo_id} holds no sequence: there is no {INDEX} in it.")
    fetch_files(api, repo_id, commit, [*remote.files, *(name for task in remote.tasks for name in task.files)])
    # by the name of the revision as well, from which the cache knows the commit when the Hub cannot be asked
    named = retried(api.hf_hub_download, repo_id, INDEX, revision=revision)
    return PublishedSequence.open(Path(named).parent.with_name(commit))


def _cached(repo_id: str, revision: str, error: Exception) -> PublishedSequence:
    """The sequence as it was when the Hub was asked last. Raises the `error` if it never was."""
    index = try_to_load_from_cache(repo_id, INDEX, revision=revision)
    if not isinstance(index, str):
        raise error
    try:
        sequence = PublishedSequence.open(Path(index).parent)
    except FileNotFoundError:
        raise error from None
    logger.warning(f"The Hub cannot be asked for {repo_id} ({error}). The copy in the cache is taken.")
    return sequence


def _download_bases(api: HubApi, sequence: PublishedSequence) -> Path:
    """The bases that lie in a repository of their own, in the cache of `huggingface_hub`."""
    repo_id = sequence.bases_at
    names = [name for task in sequence.tasks for name in task.files if name.endswith(SUBSPACE)]
    commit = retried(api.repo_info, repo_id).sha
    fetch_files(api, repo_id, commit, names)
    first = Path(retried(api.hf_hub_download, repo_id, names[0], revision=commit))
    return first.parents[len(Path(names[0]).parts) - 1]


def _copied(sequence: PublishedSequence, folder: str | Path, bases: str | Path | None = None) -> PublishedSequence:
    """
    Copies a sequence into a folder that holds none, index last, and opens the copy.

    Args:
        sequence ([`PublishedSequence`]): The sequence.
        folder (`str` or `Path`): Where to.
        bases (`str` or `Path`, *optional*): Folder with the bases, if they are not in the sequence's own.
    """
    copied = sequence.part(sequence.tasks, bases=None if bases is None else "included")
    copied.folder = Path(folder)
    for task in sequence.tasks:
        for name in task.files:
            source = Path(bases or sequence.folder) if name.endswith(SUBSPACE) else sequence.folder
            if (source / name).is_file():
                write(copied.folder / name, (source / name).read_bytes())
    copied.write_root()
    return PublishedSequence.open(folder)


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
        head (`str`, *optional*): Task whose `modules_to_save` to use instead of the newest task's. A head of another
            number of labels than the base model's takes its place, with the names of its labels.
        revision (`str`, *optional*), token (`str`, *optional*): For the Hub.

    Returns:
        `PeftModel`: In evaluation mode.

    Raises:
        ValueError: if a file was changed, the base model is another one, or a name is unknown.
    """
    sequence = fetch_sequence(source, token=token, revision=revision)
    sequence.check_base_model(base_model)
    sequence.check_adapters(base_model)
    chosen = sequence.select(upto, exclude)
    adapter = concatenate(sequence.adapters(chosen))
    if head is not None:
        heads = heads_of(sequence.adapters(sequence.select(head)[-1:])[0])
        if not heads:
            raise ValueError(f"The task {head!r} has no head of its own: it trained no `modules_to_save`.")
        adapter |= heads
    config = fitting_task_type(folded_config(sequence.config(), adapter), base_model)
    model = get_peft_model(base_model, config)
    load_adapter(model, "default", adapter)
    labels = sequence.labels_of_head(head or chosen[-1])
    if sequence.heads != "shared" and labels:
        name_labels(base_model, labels)
    return model.eval()
