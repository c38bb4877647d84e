"""Plots of the costs against rank, width of the basis and number of tasks."""

from pathlib import Path
from typing import Any

import matplotlib.figure

_LABELS = {
    "ours": "eblora_hf",
    "adamw_foreach": "AdamW, foreach",
    "geoopt": "geoopt RiemannianAdam",
    "released": "released algorithm",
    "products": "its matrix products alone",
}


def plot(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws `step.png` and `sequence.png` from the rows that are there, and returns their paths."""
    paths = []
    steps = [row for row in rows if row["what"] == "step"]
    if steps:
        names = list(dict.fromkeys(row["set"] for row in steps))
        figure = matplotlib.figure.Figure(figsize=(9, 3.4 * len(names)), layout="constrained")
        axes = figure.subplots(len(names), 2, squeeze=False)
        for name, pair in zip(names, axes, strict=True):
            for axis, varied, fixed in zip(pair, ("rank", "basis"), ("basis", "rank"), strict=True):
                of_set = [row for row in steps if row["set"] == name]
                common = of_set[0][fixed]
                _lines(axis, [row for row in of_set if row[fixed] == common], varied)
                axis.set_title(f"{name}, {fixed} {common}", fontsize=10)
        axes[0, 0].legend(fontsize=8)
        paths.append(folder / "step.png")
        figure.savefig(paths[-1], dpi=130)
    tasks = [row for row in rows if row["what"] == "sequence"]
    if tasks:
        figure = matplotlib.figure.Figure(figsize=(5.5, 3.6), layout="constrained")
        axis = figure.subplots()
        for key in [key for key in tasks[0] if key.endswith("_over_first")]:
            axis.plot([row["tasks"] for row in tasks], [row[key] for row in tasks], "o-", label=key.split("_over")[0])
        axis.set_xlabel("earlier tasks")
        axis.set_ylabel("training step over that of the first task")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
        paths.append(folder / "sequence.png")
        figure.savefig(paths[-1], dpi=130)
    return paths


def _lines(axis: Any, rows: list[dict[str, Any]], varied: str) -> None:
    rows = sorted(rows, key=lambda row: row[varied])
    for key, label in _LABELS.items():
        points = [(row[varied], row[f"{key}_over_adamw_fused"]) for row in rows if f"{key}_over_adamw_fused" in row]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", label=label)
    axis.set_yscale("log")
    axis.set_xlabel("LoRA rank" if varied == "rank" else "columns of the basis")
    axis.set_ylabel("step over fused AdamW")
