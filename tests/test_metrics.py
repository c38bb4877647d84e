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


def test_means_are_over_what_was_measured():
    single = metrics.continual_metrics([[0.5]])
    assert single["MFN"] == single["MAA"] == single["LA"] == 0.5
    assert all(math.isnan(single[name]) for name in ("BWT", "FWT", "transfer"))
    missing = np.array(MATRIX)
    missing[0, 2] = float("nan")
    values = metrics.continual_metrics(missing)
    assert values["FWT"] == pytest.approx((0.3 + 0.4) / 2)
    assert values["MFN"] == pytest.approx(0.6)
    assert metrics.unmeasured(["a", "b", "c"], missing) == []
    missing[0] = float("nan")  # as of a task that was learnt elsewhere
    values = metrics.continual_metrics(missing)
    assert values["LA"] == pytest.approx((0.8 + 0.7) / 2)
    assert values["MAA"] == pytest.approx(((0.7 + 0.8) / 2 + 0.6) / 2)
    assert values["BWT"] == pytest.approx(0.5 - 0.8)
    assert metrics.unmeasured(["a", "b", "c"], missing) == ["a"]
    assert all(math.isnan(value) for value in metrics.continual_metrics(np.full((3, 3), np.nan)).values())


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
