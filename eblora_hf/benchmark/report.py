"""Tables and JSON of benchmark results."""

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..version import __version__
from .protocol import MethodResult
from .suites import SUITES

METRICS = ("MFN", "MAA", "BWT", "LA", "FWT", "base", "similarity")
COSTS = {"room": "room, %", "megabytes": "on disk, MB", "seconds": "processor time, s"}
_LAST = 6


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    names = ("torch", "transformers", "peft", "accelerate", "scikit-learn")
    return {"python": platform.python_version(), "eblora-hf": __version__, **{name: version(name) for name in names}}


def as_json(result: MethodResult) -> dict[str, Any]:
    """A result as JSON has it: what is not defined or was not measured becomes null."""
    return {key: _without_nan(value) for key, value in asdict(result).items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# ---- one seed: the demo ----


def print_tables(console: Console, results: dict[str, MethodResult], tasks: Sequence[str]) -> None:
    """Prints metrics, accuracy matrices and the spectra of the updates."""
    table = Table(title="Accuracy in percent, test split")
    table.add_column("method")
    shown = [name for name in METRICS if any(not math.isnan(getattr(result, name)) for result in results.values())]
    for name in shown:
        table.add_column(name, justify="right")
    for method, result in results.items():
        table.add_row(method, *(f"{getattr(result, name):.1f}" for name in shown))
    console.print(table)
    for method, result in results.items():
        table = Table(title=f"{method}: accuracy after (row) on (column)")
        table.add_column("after")
        for name in tasks:
            table.add_column(name, justify="right")
        names = tasks if len(result.accuracy_matrix) > 1 else ["all"]
        for name, row in zip(names, result.accuracy_matrix, strict=True):
            table.add_row(name, *(f"{value:.1f}" for value in row))
        console.print(table)
    table = Table(title="Spectra of the trained updates: mean σᵢ/σ₁ over layers and tasks")
    table.add_column("method")
    for index in range(4):
        table.add_column(f"σ{index + 1}/σ1", justify="right")
    for method, result in results.items():
        if result.sigma_ratio:
            table.add_row(method, *(f"{ratio:.3f}" for ratio in result.sigma_ratio))
    if table.row_count:
        console.print(table)


def save_results(results: dict[str, MethodResult], seed: int, path: Path) -> None:
    """Saves the results of one seed as JSON."""
    methods = {method: as_json(result) for method, result in results.items()}
    content = {"seed": seed, "versions": package_versions(), "methods": methods}
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


# ---- many seeds: the benchmark ----


def by_method(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The lines of each method in the order of their suite, those of a method in the order of the seeds."""
    grouped = {
        method: sorted((line for line in lines if line["method"] == method), key=lambda line: line["seed"])
        for method in SUITES[lines[0]["suite"]].methods
    }
    return {method: own for method, own in grouped.items() if own}


def summary_table(lines: list[dict[str, Any]]) -> list[list[str]]:
    """A header, and per method its metrics, mean ± standard deviation over the seeds (n - 1 in the denominator)."""
    return _table(lines, {name: [line[name] for line in lines] for name in METRICS})


def cost_table(lines: list[dict[str, Any]]) -> list[list[str]]:
    """What a sequence takes, as [`summary_table`]; with the learning accuracy of the last six of more tasks."""
    columns = {title: [line[name] for line in lines] for name, title in COSTS.items()}
    if len(lines[0]["tasks"]) > _LAST:
        columns = {f"LA of the last {_LAST}": [_last_learnt(line["accuracy_matrix"]) for line in lines]} | columns
    return _table(lines, columns)


def _table(lines: list[dict[str, Any]], columns: dict[str, list[float | None]]) -> list[list[str]]:
    """By method and column mean ± standard deviation; columns are values by line, and without any value left out."""
    columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    rows = [["method", *columns]]
    for method in by_method(lines):
        own = [index for index, line in enumerate(lines) if line["method"] == method]
        rows.append([method, *(_mean_sd([values[index] for index in own]) for values in columns.values())])
    return rows


def _last_learnt(matrix: list[list[float | None]]) -> float | None:
    learnt = [row[index] for index, row in enumerate(matrix)] if len(matrix) > 1 else [None]
    numbers = [value for value in learnt[-_LAST:] if value is not None]
    return float(np.mean(numbers)) if numbers else None


def paired_rows(lines: list[dict[str, Any]], reference: str) -> list[list[str]]:
    """Per other method the difference in MFN, reference minus method, seed by seed: mean ± sd, smallest, largest."""
    methods = by_method(lines)
    rows = []
    for method, runs in methods.items():
        own = {run["seed"]: run["MFN"] for run in runs}
        differences = [run["MFN"] - own[run["seed"]] for run in methods[reference] if run["seed"] in own]
        if method != reference and differences:
            span = f"{min(differences):+.1f} … {max(differences):+.1f}"
            rows.append([method, _mean_sd(differences, sign="+"), span])
    return rows


def _mean_sd(values: Sequence[float | None], sign: str = "") -> str:
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return ""
    mean = f"{np.mean(numbers):{sign}.1f}"
    return f"{mean}±{np.std(numbers, ddof=1):.1f}" if len(numbers) > 1 else mean


def markdown(lines: list[dict[str, Any]], reference: str) -> str:
    """The summary as Markdown tables, followed by the settings in use and what it takes."""
    seeds = sorted({line["seed"] for line in lines})
    tables = [summary_table(lines)]
    if reference in by_method(lines):
        tables.append([[f"MFN of {reference} minus", "mean ± sd", "over the seeds"], *paired_rows(lines, reference)])
    settings = {method: runs[0]["settings"] for method, runs in by_method(lines).items() if runs[0]["settings"]}
    if settings:
        rows = [[method, ", ".join(f"{k} {v}" for k, v in options.items())] for method, options in settings.items()]
        tables.append([["method", "settings"], *rows])
    tables.append(cost_table(lines))
    text = "\n".join(_markdown_table(table) for table in tables if len(table[0]) > 1)
    versions = ", ".join(f"{name} {number}" for name, number in lines[0]["versions"].items())
    tasks = ", ".join(lines[0]["tasks"])
    return f"{text}\nSeeds {', '.join(map(str, seeds))}; tasks {tasks}; rank {lines[0]['rank']}. {versions}.\n"


def _markdown_table(rows: list[list[str]]) -> str:
    header, *others = rows
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *others))


def print_summary(console: Console, lines: list[dict[str, Any]], reference: str) -> None:
    """Prints the metrics of all methods, the differences from the reference and what a sequence takes."""
    tables = {"Accuracy in percent, test split, mean ± sd over the seeds": summary_table(lines)}
    if reference in by_method(lines):
        header = [f"MFN of {reference} minus", "mean ± sd", "over the seeds"]
        tables["Paired differences"] = [header, *paired_rows(lines, reference)]
    tables["What a sequence takes"] = cost_table(lines)
    for title, (header, *rows) in tables.items():
        if len(header) == 1:  # nothing of it was measured
            continue
        table = Table(title=title)
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
