"""Plots of benchmark results."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
from matplotlib.ticker import MaxNLocator

from .report import by_method

_NUMBERED = 10  # tasks at most whose matrix shows its numbers


def plot_matrices(
    matrices: dict[str, list[list[float]]], titles: dict[str, str], tasks: Sequence[str], path: Path
) -> None:
    """Draws the accuracy matrices of methods side by side, in rows of four, on one colour scale."""
    count = len(matrices)
    columns = min(count, 4)
    rows = -(-count // columns)
    crowded = len(tasks) > _NUMBERED  # numbers would lie on each other
    side = 5.4 if crowded else 3.6
    figure = matplotlib.figure.Figure(figsize=(side * columns + 0.8, (side + 0.4) * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    image: Any = None
    for axis, (method, matrix) in zip(axes.flat, matrices.items(), strict=False):
        image = axis.imshow(matrix, vmin=0, vmax=100, cmap="viridis")
        for t, row in enumerate(matrix):
            for i, value in enumerate(row):
                if crowded or np.isnan(value):  # not measured: a task without its head yet
                    continue
                colour = "black" if value > 60 else "white"
                axis.text(i, t, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
        axis.set_title(f"{method}: {titles[method]}", fontsize=10)
        axis.set_xticks(range(len(tasks)), list(tasks), rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(len(matrix)), list(tasks) if len(matrix) > 1 else ["all"], fontsize=8)
        axis.set_xlabel("accuracy on")
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("after learning")
    figure.colorbar(image, ax=axes, label="accuracy in percent", shrink=0.8)
    figure.savefig(path, dpi=150)


def plot_benchmark(lines: list[dict[str, Any]], folder: Path) -> list[Path]:
    """
    Draws accuracy matrices (mean over the seeds), MFN with error bars, the first task's accuracy over time, spectra.

    Args:
        lines (`list[dict]`): The lines of the results.
        folder (`Path`): Where the PNG files go.

    Returns:
        `list[Path]`: The files.
    """
    methods = by_method(lines)
    tasks = lines[0]["tasks"]
    means = {
        method: np.mean([np.array(run["accuracy_matrix"], dtype=float) for run in runs], axis=0)
        for method, runs in methods.items()
    }
    titles = {method: f"MFN {np.mean([run['MFN'] for run in runs]):.1f}" for method, runs in methods.items()}
    plot_matrices({method: mean.tolist() for method, mean in means.items()}, titles, tasks, folder / "matrices.png")
    _plot_mfn(methods, folder / "mfn.png")
    _plot_first_task(methods, tasks, folder / "first_task.png")
    _plot_spectra(methods, folder / "spectra.png")
    return [folder / f"{name}.png" for name in ("matrices", "mfn", "first_task", "spectra")]


def _plot_mfn(methods: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(7.2, 4.0), layout="constrained")
    axis = figure.subplots()
    ordered = sorted(methods, key=lambda method: np.mean([run["MFN"] for run in methods[method]]))
    values = [[run["MFN"] for run in methods[method]] for method in ordered]
    spread = [np.std(value, ddof=1) if len(value) > 1 else 0.0 for value in values]
    bars = axis.barh(ordered, [np.mean(value) for value in values], xerr=spread, capsize=3, color="tab:blue")
    axis.bar_label(bars, fmt="%.1f", padding=6)
    axis.set_xlim(0, 100)
    axis.set_xlabel("MFN: mean accuracy over all tasks after the last, percent (bars: standard deviation)")
    figure.savefig(path, dpi=150)


def _colors(methods: Iterable[str]) -> dict[str, Any]:
    """One of twenty colours for each method, the same in every plot."""
    return {method: matplotlib.colormaps["tab20"](index) for index, method in enumerate(methods)}


def _plot_first_task(methods: dict[str, list[dict[str, Any]]], tasks: Sequence[str], path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(7.2, 4.4), layout="constrained")
    axis = figure.subplots()
    colors = _colors(methods)
    for method, runs in methods.items():
        curves = np.array([[row[0] for row in run["accuracy_matrix"]] for run in runs], dtype=float)  # (seeds, tasks)
        if curves.shape[1] < len(tasks):  # joint training has no order
            axis.axhline(curves.mean(), linestyle=":", color=colors[method], label=method)
            continue
        mean, spread = curves.mean(axis=0), curves.std(axis=0)
        axis.plot(tasks, mean, marker="o", color=colors[method], label=method)
        axis.fill_between(tasks, mean - spread, mean + spread, color=colors[method], alpha=0.12)
    axis.set_ylim(0, 100)
    axis.set_xlabel("after learning")
    axis.set_ylabel(f"accuracy on {tasks[0]}, percent")
    axis.tick_params(axis="x", rotation=30)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=150)


def _plot_spectra(methods: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(7.2, 4.0), layout="constrained")
    axis = figure.subplots()
    for method, runs in methods.items():
        if runs[0]["sigma_ratio"]:
            ratio = np.mean([run["sigma_ratio"] for run in runs], axis=0)[: runs[0]["rank"]]
            axis.plot(range(1, len(ratio) + 1), ratio, marker="o", color=_colors(methods)[method], label=method)
    axis.set_ylim(0, 1.05)
    axis.set_xlabel("i")
    axis.set_ylabel("σᵢ/σ₁ of the trained updates, mean")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axis.lines:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
