"""Opening the published sequence that a run continues, or a new one; what is refused is refused before training."""

import contextlib
import copy
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path

from peft import LoraConfig
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

from ..published.checks import check_new_names
from ..published.hub import check_beginning
from ..published.identity import describe_base_model
from ..published.index import Heads
from ..published.loading import fetch_sequence
from ..published.locks import one_writer
from ..published.sequence import PublishedSequence
from ..published.strays import check_links, check_strays
from .adoption import read_source

logger = logging.get_logger(__name__)


def open_sequence(
    folder: Path,
    source: str | Path | None,
    base_model: nn.Module,
    tasks: list[str],
    layers: list[str],
    heads: Collection[str] = (),
    *,
    label_layer: str | None = None,
    heads_of_tasks: Heads = "shared",
    skips_learnt: bool = False,
    resuming: bool = False,
    token: str | None = None,
    writes: bool = True,
    together: Callable[[str], AbstractContextManager] = contextlib.nullcontext,
) -> PublishedSequence:
    """
    Opens the sequence in a folder, after fetching it there if it is continued from elsewhere.

    Args:
        folder (`Path`): Where the sequence is or will be.
        source (`str` or `Path`, *optional*): The sequence to continue, a folder or a Hub repository.
        base_model (`nn.Module`): The model without adapters.
        tasks (`list[str]`): Names of the tasks of this run.
        layers (`list[str]`): Names of the layers that they adapt.
        heads (`Collection[str]`): The `modules_to_save`.
        label_layer (`str`, *optional*): The layer of these heads whose size is a task's own.
        heads_of_tasks (`str`): As in [`EBLoRAConfig`].
        skips_learnt (`bool`, defaults to `False`): Whether tasks that the sequence has are passed over: a list of
            tasks says what shall be learnt in the end, while one data set is a new task.
        resuming (`bool`, defaults to `False`): Whether the run goes on with what is in the folder.
        token (`str`, *optional*): For the Hub.
        writes (`bool`, defaults to `True`): Whether this process fetches and repairs.
        together (`Callable`): Makes a context that all processes of the run leave together, or raise.

    Raises:
        ValueError: if the folder holds a sequence that this run is not meant to continue, or one of another model,
            of other layers, or with tasks of the same names.
        FileNotFoundError: if there is no sequence at `source`.
    """
    in_place = source is not None and Path(source).resolve() == folder.resolve()
    exists = PublishedSequence.exists(folder)
    with together("opening the sequence"):  # all have looked before one of them writes
        if writes:
            check_links(folder)
    if not exists and source is None:
        identity = describe_base_model(base_model, heads, label_layer)
        published = PublishedSequence(folder, identity, heads=heads_of_tasks)
        check_strays(folder, published.tasks, tasks[0])
        return published
    if exists and not resuming and not in_place:
        raise ValueError(
            f"{folder} already holds a sequence of tasks. Pass `train(resume_from_checkpoint=True)` to continue an "
            f"interrupted run, `sequence={str(folder)!r}` to append new tasks, or another `output_dir`."
        )
    with together("opening the sequence"):
        if writes and source is not None and not exists:
            fetch_sequence(source, token=token, folder=folder)
        elif writes:
            with one_writer(folder, "append", patience=60.0):
                own = PublishedSequence.open(folder, repair=True)
            if source is not None and not in_place:
                check_beginning(fetch_sequence(source, token=token).tasks, own, source)
    published = PublishedSequence.open(folder)
    published.check_base_model(base_model)
    undeclared = published.check_adapters(base_model) - set(heads)
    if undeclared:
        raise ValueError(
            f"The tasks in {folder} have trained {', '.join(sorted(undeclared))} as well, which would replace that of "
            f"the base model here. Name it in LoraConfig(modules_to_save={sorted({*heads, *undeclared})})."
        )
    published.check_layers(layers)
    pending = [name for name in tasks if name not in published.names]
    check_strays(folder, published.tasks, (pending or tasks)[0])
    taken = set(tasks) & set(published.names)
    if taken and not resuming and not skips_learnt:
        raise ValueError(
            f"The sequence in {folder} already has the task(s) {', '.join(sorted(taken))}: give new tasks new names "
            "(`task_name=…` or the keys of `train_dataset`)."
        )
    if taken and not resuming:
        logger.info(f"{folder} has the task(s) {', '.join(sorted(taken))} already: they are passed over.")
    if not pending:
        logger.warning(f"There is nothing to learn: the sequence in {folder} has all tasks of this run.")
    check_new_names(pending, published.names, folder)
    return published


def config_to_continue(source: str | Path, args: TrainingArguments | None) -> LoraConfig:
    """The configuration of an adapter like a plain one, or like that of the newest task of a sequence."""
    found = read_source(source, getattr(args, "hub_token", None))
    config = found.config() if isinstance(found, PublishedSequence) else copy.deepcopy(found.config)
    config.inference_mode = False
    return config


def check_bases(published: PublishedSequence, method: str) -> None:
    """
    Raises if a method that protects earlier tasks has nothing to protect them by.

    Raises:
        ValueError: naming the tasks without a basis.
    """
    without = published.names_without_basis()
    if without:
        raise ValueError(
            f"The task(s) {', '.join(without)} in {published.folder} were learnt by a method that keeps no basis, so "
            f"that {method!r} cannot protect them. Continue with that method, or start a new sequence."
        )
