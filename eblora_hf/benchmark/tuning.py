"""Tuning on validation: every method gets the same number of settings, stated in `settings/`."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .runs import Run, run_all
from .suite import Suite


def grid_of(suite: Suite, method: str) -> list[dict[str, Any]]:
    """All settings that a method is tried with: what is fixed, and the product of the values in its grid."""
    fixed, grid = suite.tuning[method].get("fixed", {}), suite.tuning[method]["grid"]
    return [fixed | dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def tuning_runs(suite: Suite, methods: Sequence[str], tasks: tuple[str, ...], rank: int) -> list[Run]:
    """The runs that tune some methods, on the validation split."""
    return [
        Run(suite.name, method, seed, tasks, rank, settings, measured_on="validation")
        for method in methods
        if method in suite.tuning  # a frozen model has nothing to tune
        for settings in grid_of(suite, method)
        for seed in suite.tuning_seeds
    ]


def tune(
    suite: Suite,
    methods: Sequence[str],
    tasks: tuple[str, ...],
    rank: int,
    path: Path,
    bases: Path,
    workers: int,
    done: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """
    Finds for each method the settings of its grid with the highest mean MFN on the validation splits of the
    tuning seeds; the first of equals.

    Takes the arguments of [`run_all`] for the runs of [`tuning_runs`].

    Returns:
        `dict[str, dict]`: Settings by method.
    """
    results = run_all(tuning_runs(suite, methods, tasks, rank), path, bases, workers, done)
    best = {}
    for method in methods:
        if method not in suite.tuning:
            continue
        scores = {
            index: np.mean([r["MFN"] for r in results if r["method"] == method and r["settings"] == settings])
            for index, settings in enumerate(grid_of(suite, method))
        }
        best[method] = grid_of(suite, method)[max(scores, key=lambda index: (scores[index], -index))]
    return best
