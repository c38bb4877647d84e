"""The table of a benchmark out of published sequences: each task's accuracies and the means, over several seeds."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import FiniteFloat, TypeAdapter, ValidationError

from ..metrics import accuracy_matrix, backward_transfer, forward_transfer, mean_average_accuracy, transfer
from ..published.index import root_rows
from ..published.sequence import PublishedSequence

ZERO_SHOT = "zero_shot.json"  # beside a sequence: the accuracies of the pre-trained model by task
# the tasks of each in its order
BENCHMARKS = {
    "ucit": "imagenet-r arxivqa vizwiz iconqa clevr-math flickr30k",
    "mllm-dcl": "remote-sensing medical autonomous-driving science finance",
    "mtil-order-1": "Aircraft Caltech101 CIFAR100 DTD EuroSAT Flowers Food MNIST OxfordPet StanfordCars SUN397",
    "mtil-order-2": "StanfordCars Food MNIST OxfordPet Flowers SUN397 Aircraft Caltech101 DTD EuroSAT CIFAR100",
    "text-order-1": "dbpedia amazon yahoo agnews",
    "text-order-2": "dbpedia amazon agnews yahoo",
    "text-order-3": "yahoo amazon agnews dbpedia",
}
# FWT has two readings, which differ from three tasks on
MEANS = {
    "MAA": mean_average_accuracy,
    "BWT": backward_transfer,
    "FWT over pairs": forward_transfer,
    "FWT over tasks": transfer,
}


@dataclass
class Measured:
    """
    What was measured of a sequence, in percent.

    Args:
        matrix (`np.ndarray` of shape `(T, T)`): R, with the head that plain PEFT loads after each task, unless every
            task has one of its own.
        own (`np.ndarray` of shape `(T, T)`, *optional*): R with the head that each task was learnt with, where it is
            another.
        zero_shot (`np.ndarray` of shape `(T,)`, *optional*): Of the pre-trained model.
    """

    matrix: NDArray
    own: NDArray | None
    zero_shot: NDArray | None


def benchmark_table(folders: list[Path], benchmark: str | None = None) -> dict[str, Any]:
    """
    The rows of a benchmark's table: by task and on average the accuracy at the end, over all steps and before it was
    learnt, that of the pre-trained model, and the means over the matrix.

    Args:
        folders (`list[Path]`): Published sequences of the same tasks, one of each seed.
        benchmark (`str`, *optional*): One of [`BENCHMARKS`], whose tasks they have to have learnt, all and in order.

    Returns:
        `dict`: `tasks`, `runs` (their number), `rows` and `means`: each by name a list of values of the runs, in
        percent; a row's values are those of the tasks and, last, their mean. NaN is `None`.

    Raises:
        FileNotFoundError: if there is no sequence in a folder.
        ValueError: if the sequences are of different tasks, or not of the benchmark's; if nothing was measured, or the
            loss alone; or if some have been measured before training and others not.
    """
    sequences = [PublishedSequence.open(folder) for folder in folders]
    names = BENCHMARKS[benchmark].split() if benchmark else sequences[0].names
    for folder, sequence in zip(folders, sequences, strict=True):
        if sequence.names != names:
            raise ValueError(
                f"{folder} has learnt {', '.join(sequence.names) or 'nothing'}; expected {', '.join(names)}"
                + (f", the tasks of {benchmark}." if benchmark else f", the tasks of {folders[0]}.")
            )
    runs = [_measured(folder, sequence) for folder, sequence in zip(folders, sequences, strict=True)]
    rows: dict[str, list[NDArray]] = {"Last": [run.matrix[-1] for run in runs]}
    if all(run.own is not None for run in runs):
        rows["Last, each with its own head"] = [run.own[-1] for run in runs if run.own is not None]
    rows["Avg"] = [run.matrix.mean(axis=0) for run in runs]
    rows["Transfer"] = [_before_learnt(run.matrix) for run in runs]
    lacking = [str(folder) for folder, run in zip(folders, runs, strict=True) if run.zero_shot is None]
    if 0 < len(lacking) < len(runs):
        raise ValueError(
            f"{', '.join(lacking)} has no {ZERO_SHOT}, but others have: measure it there with --zero_shot, or put the "
            "files of the others away."
        )
    if not lacking:
        rows["zero-shot"] = [run.zero_shot for run in runs if run.zero_shot is not None]
    means = {name: [_mean_of(mean, run.matrix) for run in runs] for name, mean in MEANS.items()}
    return {
        "tasks": names,
        "runs": len(runs),
        "rows": {
            name: [_with_mean(row, first=1 if name == "Transfer" else 0) for row in values]
            for name, values in rows.items()
        },
        "means": {"MFN": [_with_mean(run.matrix[-1])[-1] for run in runs]} | means,
    }


def published_matrix(sequence: PublishedSequence) -> NDArray:
    """R `(T, T)` with the head that plain PEFT loads after each task, unless every task has one of its own."""
    per_task = sequence.heads == "per-task"  # no head at the end is for all of them
    rows = [task.metrics for task in sequence.tasks] if per_task else root_rows(sequence.tasks, sequence.heads)
    return accuracy_matrix(sequence.names, rows)


def _measured(folder: Path, sequence: PublishedSequence) -> Measured:
    matrix, names = published_matrix(sequence), sequence.names
    if np.isnan(matrix).all():
        raise ValueError(f"Nothing of {folder} was measured: train with an `eval_dataset` for each task.")
    if any(record.get("metric") == "loss" for record in sequence.training()):
        raise ValueError(
            f"What {folder} has of its tasks is the loss: train with `compute_metrics`, and name an accuracy with "
            "`metric_for_best_model`."
        )
    own = None
    if sequence.heads != "per-task" and any(task.root_metrics is not None for task in sequence.tasks):
        own = 100 * accuracy_matrix(names, [task.metrics for task in sequence.tasks])
    return Measured(100 * matrix, own, _read_zero_shot(folder / ZERO_SHOT, names))


def _read_zero_shot(path: Path, names: list[str]) -> NDArray | None:
    if not path.is_file():
        return None
    try:
        measured = TypeAdapter(dict[str, FiniteFloat]).validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} is not the accuracies of the pre-trained model by task: {error}") from error
    return 100 * np.array([measured.get(name, math.nan) for name in names])


def _mean_of(mean: Callable[[NDArray], float], matrix: NDArray) -> float | None:
    """`None` unless all is measured: a mean over the others would be of another benchmark."""
    return None if np.isnan(matrix).any() else plain(mean(matrix))


def _before_learnt(matrix: NDArray) -> NDArray:
    """Of each task the mean accuracy before it was learnt; the first has none."""
    return np.array([matrix[:i, i].mean() if i else math.nan for i in range(len(matrix))])


def _with_mean(row: NDArray, first: int = 0) -> list[float | None]:
    """A row and the mean of it from a position on: `None` if a value of these is missing."""
    return [plain(value) for value in (*row, row[first:].mean() if len(row) > first else math.nan)]


def plain(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return None if math.isnan(value) else float(value)


def as_markdown(table: dict[str, Any]) -> str:
    """The rows and the means as two Markdown tables, mean ± standard deviation (n - 1) over the runs."""
    rows = [["", *table["tasks"], "mean"]]
    rows += [[name, *map(_cell, zip(*values, strict=True))] for name, values in table["rows"].items()]
    means = [list(table["means"]), [_cell(values) for values in table["means"].values()]]
    return "\n".join(_lines(part) for part in (rows, means))


def _lines(rows: list[list[str]]) -> str:
    header, *others = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *others))


def _cell(values: Any) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return ""
    return f"{np.mean(numbers):.1f}" + (f"±{np.std(numbers, ddof=1):.1f}" if len(numbers) > 1 else "")
