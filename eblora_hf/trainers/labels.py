"""Which labels a task has, as its author or its data set say, and whether the numbers in its rows are among them."""

from collections.abc import Mapping
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute  # type: ignore[import-untyped]

from ..tasks import Task

_COLUMNS = ("labels", "label")
_IGNORED = -100  # of the loss functions of torch and transformers


def task_labels(task: Task) -> list[str] | None:
    """Names of a task's labels by their numbers in its data: as the task says, or its `ClassLabel`; else `None`."""
    return task.labels if task.labels is not None else set_labels(task.train_dataset)


def set_labels(dataset: Any) -> list[str] | None:
    """Names of the `ClassLabel` in a data set's column of labels, `None` if it has no such column."""
    features: Mapping[str, Any] = getattr(dataset, "features", None) or {}
    for name in [name for name in _COLUMNS if name in features][:1]:  # models take `labels`, if it is there
        feature = features.get(name)
        feature = getattr(feature, "feature", feature)  # of a sequence of labels
        if isinstance(feature, datasets.ClassLabel):
            return list(feature.names)
    return None


def check_label_numbers(task: Task, dataset: Any, count: int, *, one_a_row: bool = False) -> None:
    """
    Raises if rows have labels that are none of the task's.

    Args:
        task ([`Task`]): The task, for the message.
        dataset: Its training or evaluation set. Only a `datasets.Dataset` shows its labels without loading all else.
        count (`int`): How many labels there are.
        one_a_row (`bool`, defaults to `False`): Whether several labels of a row, as zeros and ones, are refused.

    Raises:
        ValueError: naming the task, the number and what was expected.
    """
    if not isinstance(dataset, datasets.Dataset) or not dataset.num_rows:
        return
    for name in [name for name in _COLUMNS if name in dataset.column_names][:1]:
        values: Any = dataset.select_columns([name]).with_format("arrow")[:][name]
        while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            values = pa.compute.list_flatten(values)
        if not pa.types.is_integer(values.type):  # a regression, or several labels of a row as zeros and ones
            if one_a_row:
                raise ValueError(
                    f"The task {task.name!r} has labels that are no whole numbers: heads='grow' answers with one "
                    "label out of all. Use heads='per-task' for several labels of a row."
                )
            return
        values = pa.compute.filter(values, pa.compute.not_equal(values, _IGNORED))
        lowest, highest = (pa.compute.min_max(values)[key].as_py() for key in ("min", "max"))
        if lowest is not None and lowest < 0:
            raise ValueError(
                f"The task {task.name!r} has rows with the label {lowest}: expected 0 to {count - 1}, or {_IGNORED} "
                "for what is ignored. Take such rows out."
            )
        if highest is not None and highest >= count:
            raise ValueError(
                f"The task {task.name!r} has rows with the label {highest}, but only the labels 0 to {count - 1}. "
                f"Load the model with `num_labels={highest + 1}`, or say which labels each task has: Task(…, "
                "labels=[…]) with EBLoRAConfig(heads='per-task') or 'grow'."
            )
