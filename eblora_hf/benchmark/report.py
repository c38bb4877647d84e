"""Tables, plot and JSON of benchmark results."""

import json
import math
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import matplotlib.figure
from rich.console import Console
from rich.table import Table

from ..version import __version__
from .digits import TASKS
from .protocol import MethodResult

_METRICS = ("MFN", "MAA", "BWT", "LA", "FWT", "base")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    names = ("torch", "transformers", "peft", "accelerate", "scikit-learn")
    return {"python": platform.python_version(), "eblora-hf": __version__, **{name: version(name) for name in names}}


def print_tables(console: Console, results: dict[str, MethodResult]) -> None:
    """Prints the metrics, the accuracy matrix of each method and the spectra of the trained updates."""
    table = Table(title="Accuracy in percent on the test split", caption="base: upright digits after the last task")
    table.add_column("method")
    for name in _METRICS:
        table.add_column(name, justify="right")
    for method, result in results.items():
        table.add_row(method, *(f"{getattr(result, name):.1f}" for name in _METRICS))
    console.print(table)
    for method, result in results.items():
        table = Table(title=f"{method}: accuracy after (row) on (column)")
        table.add_column("after")
        for name in TASKS:
            table.add_column(name, justify="right")
        for name, row in zip(TASKS, result.accuracy_matrix, strict=True):
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


def plot_matrices(results: dict[str, MethodResult], path: Path) -> None:
    """Draws the accuracy matrices of all methods side by side, on one colour scale."""
    count = len(results)
    figure = matplotlib.figure.Figure(figsize=(3.6 * count + 0.8, 4.4), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    image = None
    for axis, (method, result) in zip(axes, results.items(), strict=True):
        image = axis.imshow(result.accuracy_matrix, vmin=0, vmax=100, cmap="viridis")
        for t, row in enumerate(result.accuracy_matrix):
            for i, value in enumerate(row):
                colour = "black" if value > 60 else "white"
                axis.text(i, t, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
        axis.set_title(f"{method}: MFN {result.MFN:.1f}, BWT {result.BWT:.1f}", fontsize=10)
        axis.set_xticks(range(len(TASKS)), list(TASKS), rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(len(TASKS)), list(TASKS) if axis is axes[0] else [], fontsize=8)
        axis.set_xlabel("accuracy on")
    axes[0].set_ylabel("after learning")
    figure.colorbar(image, ax=axes, label="accuracy in percent", shrink=0.8)
    figure.savefig(path, dpi=150)


def save_results(results: dict[str, MethodResult], seed: int, path: Path) -> None:
    """Saves results as JSON; a metric that is not defined becomes null."""
    methods = {
        method: {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(result).items()
        }
        for method, result in results.items()
    }
    content = {"seed": seed, "versions": package_versions(), "methods": methods}
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
