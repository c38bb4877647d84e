"""Continual-learning metrics of an accuracy matrix R, where R[t][i] is the accuracy on task i after learning task t.

Rows and columns are in the order the tasks were learnt. Accuracies may be fractions or percentages: every metric is in
the unit of the matrix. Entries that were not measured are NaN: means are over the others, and `unmeasured` says which
tasks they leave out. A metric without a defined value (BWT of a single task, say) is NaN.
"""

import datasets
import evaluate
import numpy as np

FORMULAS = {
    "MFN": "mean over i of R[T][i]",
    "MAA": "mean over t of the mean over i <= t of R[t][i]",
    "LA": "mean over i of R[i][i] (also called MFT)",
    "BWT": "mean over i < T of R[T][i] - R[i][i]",
    "FWT": "mean over pairs t < i of R[t][i]",
    "transfer": "mean over i > 1 of the mean over t < i of R[t][i]",
}


def mean_final_accuracy(matrix) -> float:
    """MFN: mean over i of R[T][i], the accuracy over all tasks after the last one."""
    return _mean(_check(matrix)[-1])


def mean_average_accuracy(matrix) -> float:
    """
    MAA: mean over t of the mean over i <= t of R[t][i], the accuracy on what has been learnt, over the whole sequence.
    """
    return _mean([_mean(row[: t + 1]) for t, row in enumerate(_check(matrix))])


def learning_accuracy(matrix) -> float:
    """
    LA, also MFT (mean fine-tuning accuracy): mean over i of R[i][i], the accuracy on each task just after learning it.
    """
    return _mean(np.diagonal(_check(matrix)))


def backward_transfer(matrix) -> float:
    """BWT: mean over i < T of R[T][i] - R[i][i]; negative where learning later tasks forgot earlier ones."""
    matrix = _check(matrix)
    return _mean((matrix[-1] - np.diagonal(matrix))[:-1])


def forward_transfer(matrix) -> float:
    """
    FWT: mean over pairs t < i of R[t][i], the accuracy on tasks not learnt yet. Compare it with the frozen model's.
    """
    matrix = _check(matrix)
    return _mean(matrix[np.triu_indices(len(matrix), k=1)])


def transfer(matrix) -> float:
    """
    Transfer (MTIL benchmark): mean over i > 1 of the mean over t < i of R[t][i]; weights tasks, where FWT weights
    pairs.
    """
    matrix = _check(matrix)
    return _mean([_mean(matrix[:i, i]) for i in range(1, len(matrix))])


def accuracy_matrix(names: list[str], rows: list[dict[str, float]]) -> np.ndarray:
    """
    R from what was measured after each task.

    Args:
        names (`list[str]`): The T tasks in the order they were learnt.
        rows (`list[dict[str, float]]`): Per learnt task the accuracies by task name; other names are passed over.

    Returns:
        `np.ndarray` of shape `(T, T)`, NaN where nothing was measured.

    Example:

    >>> accuracy_matrix(["a", "b"], [{"a": 0.9}, {"a": 0.7, "b": 0.8, "another": 0.5}]).tolist()
    [[0.9, nan], [0.7, 0.8]]
    """
    return np.array([[row.get(name, np.nan) for name in names] for row in rows], dtype=np.float64).reshape(
        len(names), len(names)
    )


def unmeasured(names: list[str], matrix) -> list[str]:
    """
    The tasks that were not measured each time from when they were learnt on, so that means leave out some of it.

    Args:
        names (`list[str]`): The T tasks.
        matrix (array-like of shape `(T, T)`): R[t][i], the accuracy on task i after learning task t.

    Example:

    >>> unmeasured(["a", "b"], [[float("nan"), float("nan")], [0.7, 0.8]])
    ['a']
    """
    matrix = _check(matrix)
    return [name for index, name in enumerate(names) if np.isnan(matrix[index:, index]).any()]


def continual_metrics(matrix) -> dict[str, float]:
    """
    All metrics of an accuracy matrix, by the names and formulas of `FORMULAS`.

    Args:
        matrix (array-like of shape `(T, T)`): R[t][i], the accuracy on task i after learning task t.

    Returns:
        `dict[str, float]`: MFN, MAA, LA, BWT, FWT and transfer, NaN where undefined.

    Raises:
        ValueError: if the matrix is empty or not square.

    Example:

    >>> metrics = continual_metrics([[0.9, 0.2], [0.7, 0.8]])
    >>> {name: round(value, 3) for name, value in metrics.items()}
    {'MFN': 0.75, 'MAA': 0.825, 'LA': 0.85, 'BWT': -0.2, 'FWT': 0.2, 'transfer': 0.2}
    """
    return {
        "MFN": mean_final_accuracy(matrix),
        "MAA": mean_average_accuracy(matrix),
        "LA": learning_accuracy(matrix),
        "BWT": backward_transfer(matrix),
        "FWT": forward_transfer(matrix),
        "transfer": transfer(matrix),
    }


class ContinualMetrics(evaluate.Metric):
    """
    The metrics of this module as an `evaluate.Metric`: `add` or `compute` with `accuracy_matrix`, one row per task.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="accuracy_matrix: T rows of T accuracies, row t measured after learning task t.",
            features=datasets.Features({"accuracy_matrix": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, accuracy_matrix) -> dict[str, float]:
        return continual_metrics(accuracy_matrix)


def _check(matrix) -> np.ndarray:
    try:
        matrix = np.asarray(matrix, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"An accuracy matrix has as many rows as columns, got {matrix!r}.") from error
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"An accuracy matrix has as many rows as columns, at least one; got shape {matrix.shape}.")
    return matrix


def _mean(values) -> float:
    values = np.asarray(values, dtype=np.float64)
    measured = values[~np.isnan(values)]
    return float(measured.mean()) if measured.size else float("nan")
