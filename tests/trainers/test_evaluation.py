"""The row of the accuracy matrix without a trainer."""

import contextlib

import pytest
from transformers import EarlyStoppingCallback, PrinterCallback
from transformers.trainer_callback import CallbackHandler

from eblora_hf.trainers.evaluation import accuracy_row, sets_to_measure, without_early_stopping


def evaluate(sets):
    (name,) = sets
    return {f"eval_{name}_loss": 1.5, f"eval_{name}_accuracy": {"a": 0.5, "b": float("nan"), "c": 0.25}[name]}


def test_a_row_has_the_finite_numbers_of_the_first_metric_that_there_is():
    heads = []

    @contextlib.contextmanager
    def head_of(name):
        heads.append(name)
        yield

    row = accuracy_row(dict.fromkeys("abc"), evaluate, ["f1", "accuracy"], head_of)
    assert row == {"a": 0.5, "c": 0.25}
    assert heads == ["a", "b", "c"]


def test_the_loss_is_no_accuracy(caplog):
    assert accuracy_row({"a": None}, evaluate, ["loss"], expected=True) == {}
    assert "evaluation returns accuracy, loss" in caplog.text


@pytest.mark.parametrize("alone", [True, False])
def test_sets_by_name(alone):
    sets = {"a": 1, "b": 2}
    assert sets_to_measure(sets, "a", alone=alone) == sets
    assert sets_to_measure(3, "a", alone=alone) == ({"a": 3} if alone else {})
    assert sets_to_measure(None, "a", alone=alone) == {}


def test_early_stopping_comes_back_when_an_evaluation_fails():
    stopping = EarlyStoppingCallback()
    handler = CallbackHandler([PrinterCallback(), stopping], None, None, None, None)

    def measure():
        with without_early_stopping(handler):
            assert stopping not in handler.callbacks
            raise RuntimeError("a set that cannot be read")

    with pytest.raises(RuntimeError):
        measure()
    assert stopping in handler.callbacks
