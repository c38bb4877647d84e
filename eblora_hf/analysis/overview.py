"""What a published sequence is, at a glance: its tasks, what is left of them, its size and the room for more."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..metrics import continual_metrics
from ..published.adapter_files import read_adapter_file
from ..published.index import ADAPTER, ADAPTER_CONFIG, SUBSPACE
from ..published.sequence import PublishedSequence
from .table import plain, published_matrix

_IN_WORDS = {
    "MFN": "mean accuracy after the last task",
    "LA": "mean accuracy just after learning a task",
    "BWT": "mean change of a task since it was learnt",
    "MAA": "mean accuracy on what had been learnt, over the sequence",
    "FWT": "mean accuracy on tasks not learnt yet",
}


def describe_sequence(sequence: PublishedSequence) -> dict[str, Any]:
    """
    What the files of a sequence say of it.

    Args:
        sequence ([`PublishedSequence`]): It has one task at least.

    Returns:
        `dict`: In plain values for JSON. `tasks` in their order, each with `name`, `created`, `method`, `rank`,
            `steps`, `labels` (their number), `columns` (that it added to the bases of all layers), and `megabytes`;
            `metric` and `matrix` R, measured with what plain PEFT loads, unless each task has a head of its own;
            `metrics` of it; `room`, the mean and the smallest share of a layer's input directions that no basis takes,
            with the name of that layer; `root_rank`, and `megabytes` of all files together. What is not known is
            `None`.

    Raises:
        ValueError: if a file of it is not what it should be; the message names it.
    """
    records = sequence.training()
    matrix = published_matrix(sequence)
    measured = not np.isnan(matrix).all()
    tasks: list[dict[str, Any]] = [
        {
            "name": task.name,
            "created": task.created,
            "method": record.get("eblora_config", {}).get("method"),
            "rank": task.rank,
            "steps": task.steps,
            "labels": len(task.labels) if task.labels else None,
            "columns": record.get("bases", {}).get("columns"),
            "megabytes": _megabytes(sequence, task.files),
        }
        for task, record in zip(sequence.tasks, records, strict=True)
    ]
    return {
        "base_model": sequence.base_model["name_or_path"] or None,
        "architecture": sequence.base_model["architecture"],
        "revision": sequence.base_model["revision"],
        "heads": sequence.heads,
        "bases": sequence.bases_at,
        "tasks": tasks,
        "metric": records[-1].get("metric") if measured else None,
        "matrix": [[plain(value) for value in row] for row in matrix] if measured else None,
        "metrics": {name: plain(value) for name, value in continual_metrics(matrix).items()} if measured else None,
        "room": _room(sequence),
        "root_rank": read_adapter_file(sequence.folder / ADAPTER_CONFIG).r,
        "megabytes": sum(task["megabytes"] for task in tasks) + _megabytes(sequence, (ADAPTER, ADAPTER_CONFIG)),
    }


def _megabytes(sequence: PublishedSequence, files: Iterable[str]) -> float:
    """Of those that are there: bases may lie elsewhere."""
    paths = [sequence.folder / file for file in files]
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def _room(sequence: PublishedSequence) -> dict[str, Any] | None:
    kept = [sequence.folder / task.folder / SUBSPACE for task in sequence.tasks if task.has_basis]
    if not kept or not all(path.is_file() for path in kept):
        return None
    free = {name: 1.0 - basis.shape[1] / basis.shape[0] for name, basis in sequence.bases().items()}
    layer = min(free, key=lambda name: free[name])
    return {"mean": sum(free.values()) / len(free), "least": free[layer], "layer": layer}


def tables(described: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """What [`describe_sequence`] says as tables: title, header and rows of each."""
    tasks = described["tasks"]
    columns = ("created", "method", "rank", "steps", "labels", "columns", "megabytes")
    rows = [[task["name"], *(_cell(task[column]) for column in columns)] for task in tasks]
    header = ["task", "created", "method", "rank", "steps", "labels", "basis columns", "MB"]
    shown = [("Tasks", header, rows)]
    if described["matrix"]:
        names = [task["name"] for task in tasks]
        matrix = [[f"after {name}", *map(_cell, row)] for name, row in zip(names, described["matrix"], strict=True)]
        shown.append((f"{described['metric'] or 'Metric'} on each task", ["", *names], matrix))
        metrics = [[name, _cell(described["metrics"][name]), words] for name, words in _IN_WORDS.items()]
        shown.append(("Means", ["", "", ""], [row for row in metrics if row[1]]))
    return shown


def sentences(described: dict[str, Any]) -> list[str]:
    """What is no table."""
    room, base = described["room"], described["base_model"] or "a model without a name"
    lines = [f"Learnt on {base} ({described['architecture']}), heads: {described['heads']}."]
    if room:
        lines.append(
            f"Of the input directions of a layer {room['mean']:.0%} are in no basis on average, and "
            f"{room['least']:.0%} in {room['layer']}."
        )
    else:
        lines.append(f"The room that is left is not known here (bases: {described['bases']}).")
    lines.append(f"Rank of the root adapter {described['root_rank']}; {described['megabytes']:.1f} MB on disk.")
    return lines


def _cell(value: float | int | str | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
