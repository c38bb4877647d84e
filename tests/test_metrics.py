import math

import numpy as np
import pytest

from eblora_hf import ContinualMetrics, metrics

MATRIX = [[0.9, 0.3, 0.2], [0.7, 0.8, 0.4], [0.6, 0.5, 0.7]]


def test_formulas_by_hand():
    assert metrics.continual_metrics(MATRIX) == pytest.approx(
        {
            "MFN": (0.6 + 0.5 + 0.7) / 3,
            "MAA": (0.9 + (0.7 + 0.8) / 2 + (0.6 + 0.5 + 0.7) / 3) / 3,
            "LA": (0.9 + 0.8 + 0.7) / 3,
            "BWT": ((0.6 - 0.9) + (0.5 - 0.8)) / 2,
            "FWT": (0.3 + 0.2 + 0.4) / 3,
            "transfer": (0.3 + (0.2 + 0.4) / 2) / 2,
        }
    )
    assert set(metrics.FORMULAS) == set(metrics.continual_metrics(MATRIX))


def test_single_task_and_missing_entries_are_nan():
    single = metrics.continual_metrics([[0.5]])
    assert single["MFN"] == single["MAA"] == single["LA"] == 0.5
    assert all(math.isnan(single[name]) for name in ("BWT", "FWT", "transfer"))
    missing = np.array(MATRIX)
    missing[0, 2] = float("nan")
    values = metrics.continual_metrics(missing)
    assert math.isnan(values["FWT"])
    assert values["MFN"] == pytest.approx(0.6)


def test_input_is_left_alone():
    matrix = np.array(MATRIX)
    metrics.continual_metrics(matrix)
    np.testing.assert_array_equal(matrix, MATRIX)


@pytest.mark.parametrize("matrix", [[], [[0.1, 0.2]], [[0.1], [0.2, 0.3]], "abc", 0.5])
def test_anything_but_a_square_matrix_is_refused(matrix):
    with pytest.raises(ValueError, match="as many rows as columns"):
        metrics.continual_metrics(matrix)


def test_as_an_evaluate_metric(tmp_path):
    metric = ContinualMetrics(cache_dir=str(tmp_path))
    assert metric.compute(accuracy_matrix=MATRIX) == pytest.approx(metrics.continual_metrics(MATRIX))
    for row in MATRIX:
        metric.add(accuracy_matrix=row)
    assert metric.compute() == pytest.approx(metrics.continual_metrics(MATRIX))
