"""What the `run_*.py` scripts share: the list of tasks, labels, and the run itself."""

import dataclasses
import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from arguments import DataArguments, as_number, read_file
from datasets import ClassLabel, Dataset, load_dataset
from datasets.exceptions import DatasetsError

from eblora_hf import ContinualEBLoRATrainer, Task, TaskSequence
from eblora_hf.published.files import json_bytes, write

READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SOURCE = ("dataset", "config", "splits", "data_files", "columns")
OVERRIDES = ("num_train_epochs", "max_steps", "learning_rate", "direction_lr", "scale_lr", "head_learning_rate")


# ---- tasks ----


@dataclass
class TaskData:
    """
    One task with its data sets, whose columns have the names that the script uses.

    Args:
        task ([`Task`]): Its name and rates, without data.
        train, validation (`datasets.Dataset`): Its data; no `validation` if it cannot be measured.
        options (`dict`): What only one script asks for.
    """

    task: Task
    train: Dataset
    validation: Dataset | None
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.task.name

    def apply(self, function: Callable[[Dataset, str], Dataset]) -> None:
        """Replaces both data sets by what a function of the data and the name of the split makes of them."""
        self.train = function(self.train, "train")
        if self.validation is not None:
            self.validation = function(self.validation, "validation")


def as_sequence(tasks: list[TaskData]) -> TaskSequence:
    """The tasks as the trainer takes them."""
    return TaskSequence(
        [dataclasses.replace(data.task, train_dataset=data.train, eval_dataset=data.validation) for data in tasks]
    )


def load_tasks(
    arguments: DataArguments,
    forms: list[tuple[str, ...]],
    optional_columns: Collection[str] = (),
    options: Collection[str] = (),
) -> list[TaskData]:
    """
    Reads the list of tasks and loads their data. The whole list is checked before anything is loaded.

    Args:
        arguments (`DataArguments`): Where the list and the data are.
        forms (`list[tuple[str, ...]]`): Sets of columns; a data set needs all of one of them.
        optional_columns (collection of `str`): Columns that are kept where they exist.
        options (collection of `str`): Further keys of a task.

    Raises:
        FileNotFoundError: for a file that does not exist.
        ValueError: for an unknown key, a name or number that does not fit, or a missing column.
    """
    entries = arguments.tasks
    if isinstance(entries, str):
        entries = read_file(Path(entries), "task file", list)
    root = Path(arguments.data_dir)
    tasks = TaskSequence([_read_task(entry, {"name", *SOURCE, *OVERRIDES, *options}, root) for entry in entries])
    loaded = []
    for entry, task in zip(entries, tasks, strict=True):
        train, validation = (
            _with_columns(_load(entry, split, root), entry, split, forms, optional_columns)
            for split in ("train", "validation")
        )
        loaded.append(TaskData(task, train, validation, {key: entry[key] for key in options if key in entry}))
    return loaded


def _read_task(entry: Any, known: Collection[str], root: Path) -> Task:
    if not isinstance(entry, dict) or "name" not in entry:
        raise ValueError(f"Every task is a mapping with a 'name', got {entry!r}.")
    name = entry["name"]
    unknown = sorted(entry.keys() - known)
    if unknown:
        raise ValueError(
            f"The task {name!r} has the key(s) {', '.join(unknown)}; known are {', '.join(sorted(known))}."
        )
    if ("dataset" in entry) == ("data_files" in entry):
        raise ValueError(f"The task {name!r} needs either 'dataset' or 'data_files'.")
    for key in ("data_files", "splits", "columns"):
        if not isinstance(entry.get(key, {}), dict):
            raise ValueError(f"{key!r} of the task {name!r} is {entry[key]!r}: expected a mapping.")
    for split in ("train", "validation") if "data_files" in entry else ():
        file = entry["data_files"].get(split)
        if file is None or not (root / file).is_file():
            raise FileNotFoundError(
                f"The task {name!r} has no {split} file: {str(root / str(file))!r} does not exist."
            )
        if Path(file).suffix not in READERS:
            raise ValueError(f"The task {name!r}: {file!r} is of no known type, expected {', '.join(READERS)}.")
    rates = {key: entry[key] for key in OVERRIDES if entry.get(key) is not None}
    kinds = {"num_train_epochs": float, "max_steps": int, "learning_rate": float, "head_learning_rate": float}
    for key, kind in kinds.items():
        if key in rates:
            rates[key] = as_number(f"{key} of the task {name!r}", rates[key], kind)
    return Task(name, train_dataset=(), **rates)


def _load(entry: dict, split: str, root: Path) -> Dataset:
    if "data_files" in entry:  # one by one: their columns may differ
        path, wanted = root / entry["data_files"][split], split
        source, options = READERS[path.suffix], {"data_files": {split: str(path)}}
    else:
        folder, wanted = root / entry["dataset"], entry.get("splits", {}).get(split, split)
        path = folder if folder.is_dir() else entry["dataset"]
        source, options = str(path), {"name": entry.get("config")}
    try:
        return load_dataset(source, split=wanted, **options)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"The task {entry['name']!r}: the {split} data, split {wanted!r} of {str(path)!r}, cannot be loaded: "
            f"{error}"
        ) from error


def _with_columns(data: Dataset, entry: dict, split: str, forms: list, optional_columns: Collection[str]) -> Dataset:
    """The data with the columns of one form, by the names of the script."""
    given = entry.get("columns", {})
    for form in forms:
        if all(given.get(column, column) in data.column_names for column in form):
            kept = {given.get(column, column): column for column in (*form, *optional_columns)}
            kept = {old: new for old, new in kept.items() if old in data.column_names}
            return data.select_columns(list(kept)).rename_columns(kept)
    wanted = " or ".join(", ".join(repr(given.get(column, column)) for column in form) for form in forms)
    raise ValueError(
        f"The task {entry['name']!r} needs the columns {wanted}, but its {split} data has "
        f"{', '.join(map(repr, data.column_names))}. Say which is which with 'columns: {{{forms[0][0]}: …}}'."
    )


# ---- labels ----


def name_labels(task: TaskData) -> None:
    """
    Makes the column `label` of a task text: the names of a `ClassLabel`, or the values as they are.

    Raises:
        ValueError: if a row has no label.
    """

    def named(data: Dataset, split: str) -> Dataset:
        feature, values = data.features["label"], data.unique("label")
        if None in values or (isinstance(feature, ClassLabel) and -1 in values):
            raise ValueError(f"The {split} data of the task {task.name!r} has rows without a label.")
        names = {value: feature.int2str(value) if isinstance(feature, ClassLabel) else str(value) for value in values}
        labels = [names[value] for value in data["label"]]
        return data.remove_columns("label").add_column("label", labels)

    task.apply(named)


def index_labels(task: TaskData, labels: list[str]) -> None:
    """
    Replaces the column `label` of a task by `labels`, the position of each row's label in a list.

    Raises:
        ValueError: if a label is not in the list.
    """
    index = {label: i for i, label in enumerate(labels)}

    def indexed(data: Dataset, split: str) -> Dataset:
        unknown = sorted(set(data.unique("label")) - set(labels))
        if unknown:
            raise ValueError(
                f"The {split} data of the task {task.name!r} has the label(s) {', '.join(map(repr, unknown))}, which "
                f"are not among the {len(labels)} labels that are learnt: {', '.join(map(repr, labels[:20]))}."
            )
        return data.add_column("labels", [index[label] for label in data["label"]]).remove_columns("label")

    task.apply(indexed)


def share_labels(tasks: list[TaskData], labels: list[str] | None) -> dict[str, dict]:
    """
    Prepares the tasks for a head they share: its labels are those given, or those of all training sets, sorted.

    Returns:
        `dict[str, dict]`: `id2label` and `label2id` for the model.
    """
    for task in tasks:
        name_labels(task)
    labels = labels or sorted({label for task in tasks for label in task.train.unique("label")})
    for task in tasks:
        index_labels(task, labels)
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def largest(logits: Any, labels: Any) -> Any:
    """For `preprocess_logits_for_metrics`: keeps the index of the largest logit, and nothing else of the outputs."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


# ---- the run ----


def learn(trainer: ContinualEBLoRATrainer, *, zero_shot: bool = False) -> None:
    """
    Learns the tasks and writes `train_results.json`, `eval_results.json`, `all_results.json` and the state; before it,
    if asked to, `zero_shot.json` of the pre-trained model; what is in it is not measured again.
    """
    if zero_shot:
        _measure_pretrained(trainer, Path(trainer.args.output_dir) / "zero_shot.json")
    resume = trainer.args.resume_from_checkpoint
    result = trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    matrix, names = trainer.accuracy_matrix, trainer.task_callback.sequence.names
    metric = _metric(trainer)
    final = {f"eval_{name}_{metric}": float(value) for name, value in zip(names, matrix[-1], strict=True)}
    for split, metrics in (("train", result.metrics), ("eval", final)):
        metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"Accuracy on {', '.join(names)} after each task:\n{np.array_str(matrix, precision=3)}")


def _metric(trainer: ContinualEBLoRATrainer) -> str:
    """What fills the accuracy matrix."""
    metric = (trainer.args.metric_for_best_model or "accuracy").removeprefix("eval_")
    return "accuracy" if metric == "loss" else metric


def _measure_pretrained(trainer: ContinualEBLoRATrainer, path: Path) -> None:
    """
    Adds the tasks to a file of what the pre-trained model reaches on each that are not in it yet.

    Raises:
        ValueError: under FSDP, whose weights are whole only while it trains.
    """
    if trainer.is_fsdp_enabled:
        raise ValueError("zero_shot: measure the pre-trained model without FSDP, in a run of its own.")
    known: list[Any] = [json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}]
    row, metric = broadcast_object_list(known)[0], _metric(trainer)  # one process says what there is
    with trainer.pretrained_model():
        for task in trainer.tasks:
            if task.eval_dataset is not None and task.name not in row:
                row[task.name] = trainer.evaluate({task.name: task.eval_dataset})[f"eval_{task.name}_{metric}"]
    if trainer.is_world_process_zero():
        write(path, json_bytes(row))
