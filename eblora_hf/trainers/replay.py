"""Rows of earlier tasks, kept on this machine and mixed into the batches of later ones."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..published.files import temporary_name
from ..tasks import Task
from .surface import TrainerSurface

logger = logging.get_logger(__name__)

_FOLDER = "replay"  # beside the sequence; nothing in it is ever pushed


class ReplayingMixin(TrainerSurface):
    """Overrides the loader of the training set, which gets rows of earlier tasks where the options say so."""

    _replays = True
    _mixes = False  # the loader of the task in training was made here

    @contextlib.contextmanager
    def without_replay(self) -> Iterator[None]:
        """Within the context a loader has the rows of its own data set alone."""
        self._replays = False
        try:
            yield
        finally:
            self._replays = True

    def get_train_dataloader(self) -> DataLoader:
        rows = self._rows_of_earlier_tasks() if self._replays else []
        self._mixes |= self._replays
        if not rows:
            return super().get_train_dataloader()
        before = self.train_dataset, self.data_collator
        if isinstance(self.train_dataset, datasets.Dataset):
            data, collator = self._remove_unused_columns(self.train_dataset, "training"), self.data_collator
        else:
            data, collator = self.train_dataset, self._get_collator_with_removed_columns(self.data_collator)
        mixed = Mixing(collator, rows, self.eblora_config.replay_batch, self.args.seed + self.args.process_index)
        self.train_dataset, self.data_collator = Numbered(data), mixed
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = before

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.eblora_config.replay_fraction and self.begun.sequence.tasks and not self._mixes:
            raise ValueError(
                f"replay_fraction={self.eblora_config.replay_fraction}: `get_train_dataloader` is overridden, so that "
                "no rows of earlier tasks are mixed in. Call super() in it, or set replay_fraction=0."
            )
        return super().training_step(*args, **kwargs)

    def check_replay(self) -> None:
        """Raises a `ValueError` for rows that could not be kept, before anything is learnt."""
        for task in (self.tasks or ()) if self.eblora_config.replay_fraction else ():
            _table([task.train_dataset[0]], f"of the task {task.name!r}")

    def _rows_of_earlier_tasks(self) -> list[dict[str, Any]]:
        if not self.eblora_config.replay_fraction or self.task_callback is None:
            return []
        names, kept = self.begun.sequence.names, []
        missing = []
        for name in names:
            rows = read_rows(Path(self.begun.sequence.folder) / _FOLDER / name)
            kept += rows
            missing += [] if rows else [name]
        if missing:
            logger.warning(
                f"replay_fraction={self.eblora_config.replay_fraction}: no rows of {', '.join(missing)} lie in "
                f"{self.begun.sequence.folder / _FOLDER}, so that none of them are mixed in. They are kept where a "
                "task was learnt with replay, and never pushed."
            )
        return kept

    def keep_rows(self, task: Task, seed: int) -> None:
        """Keeps a sample of a task's rows beside the sequence, on the process that writes."""
        self._mixes = False
        if not self.eblora_config.replay_fraction or not self.args.should_save:
            return
        data = task.train_dataset
        if isinstance(data, datasets.Dataset):
            data = self._remove_unused_columns(data, "replay")
        count = max(round(len(data) * self.eblora_config.replay_fraction), 1)
        chosen = np.random.default_rng(seed).permutation(len(data))[:count]
        write_rows(Path(self.args.output_dir) / _FOLDER / task.name, [data[int(index)] for index in sorted(chosen)])


class Numbered(Dataset):
    """Rows together with their number."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.data[index]


class Mixing:
    """
    A collator that adds rows to a batch. Which ones depends on the numbers of the batch's own rows alone, so that a
    run that is resumed goes on with the same.

    Args:
        collator (`Callable`): For the whole of it.
        rows (`list[dict]`): Rows of earlier tasks.
        count (`int`): How many are added to each batch.
        seed (`int`): Of the choice.
    """

    def __init__(self, collator: Callable, rows: list[dict[str, Any]], count: int, seed: int):
        self.collator, self.rows, self.count, self.seed = collator, rows, count, seed

    def __call__(self, numbered: list[tuple[int, Any]]) -> Any:
        numbers = [number for number, _ in numbered]
        chosen = np.random.default_rng([self.seed, *numbers]).integers(len(self.rows), size=self.count)
        return self.collator([row for _, row in numbered] + [self.rows[index] for index in chosen])


def write_rows(folder: Path, rows: list[Any]) -> None:
    """
    Writes rows into a folder, in place of what is there.

    Raises:
        ValueError: if they are not dicts of what Arrow holds: numbers, text, images and lists of them, or tensors.
    """
    temporary = temporary_name(folder)
    with _without_progress_bars():
        _table(rows, f"for {folder}").save_to_disk(str(temporary))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def _table(rows: list[Any], which: str) -> datasets.Dataset:
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"replay_fraction needs rows that are dicts, but those {which} are {type(rows[0]).__name__} objects. Set "
            "it to 0, or have the data set return {'input_ids': …, 'labels': …} or the like."
        )
    tensors = [name for name, value in rows[0].items() if isinstance(value, torch.Tensor)]
    try:
        table = datasets.Dataset.from_list([{key: _plain(value) for key, value in row.items()} for row in rows])
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"replay_fraction: the rows {which} cannot be kept ({error!s:.200}). Set it to 0.") from error
    return table.with_format("torch", columns=tensors, output_all_columns=True) if tensors else table


def _plain(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.numpy() if value.ndim else value.numpy()[()]


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows in a folder; none if it is not there."""
    if not folder.is_dir():
        return []
    table = datasets.load_from_disk(str(folder))
    names = table.format["columns"] if table.format["type"] == "torch" else []
    kinds = {name: _dtype(table.features[name]) for name in names}  # the torch format makes all int64 or float32
    return [
        {name: torch.tensor(value, dtype=kinds[name]) if name in kinds else value for name, value in row.items()}
        for row in table.with_format(None)
    ]


def _dtype(feature: Any) -> torch.dtype:
    """What the numbers of a column are."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return getattr(torch, feature.dtype)
