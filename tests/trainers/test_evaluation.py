"""The row of the accuracy matrix without a trainer."""

import contextlib
import math

import pytest
from transformers import EarlyStoppingCallback, PrinterCallback
from transformers.trainer_callback import CallbackHandler

from eblora_hf.trainers.evaluation import (
    Measured,
    metric_row,
    sets_to_measure,
    warn_of_missing_sets,
    without_early_stopping,
)


def measures(**metrics):
    """`Trainer.evaluate` that returns these, which may differ by set."""

    def evaluate(sets):
        (name,) = sets
        values = {"loss": 1.5, "runtime": 0.1, "samples_per_second": 3.0} | metrics
        return {
            f"eval_{name}_{metric}": value[name] if isinstance(value, dict) else value
            for metric, value in values.items()
        }

    return evaluate


def test_a_row_has_the_finite_numbers_of_one_metric(caplog):
    heads = []

    @contextlib.contextmanager
    def head_of(name):
        heads.append(name)
        yield

    evaluate = measures(accuracy={"a": 0.5, "b": math.nan, "c": 0.25})
    assert metric_row(dict.fromkeys("abc"), evaluate, None, head_of) == Measured("accuracy", {"a": 0.5, "c": 0.25})
    assert heads == ["a", "b", "c"]
    assert "The accuracy of b is no finite number" in caplog.text


@pytest.mark.parametrize(
    ("metrics", "wanted", "chosen"),
    [
        ({"accuracy": 0.5, "f1": 0.4}, None, "accuracy"),
        ({"accuracy": 0.5, "f1": 0.4}, "f1", "f1"),
        ({"accuracy": 0.5, "f1": 0.4}, "eval_f1", "f1"),
        ({"accuracy": 0.5}, "loss", "accuracy"),
        ({"accuracy": 0.5}, "eval_loss", "accuracy"),
        ({"f1": 0.4}, None, "f1"),
        ({"f1": 0.4}, "loss", "f1"),
        ({"mean_token_accuracy": 0.4}, None, "mean_token_accuracy"),
        ({}, None, "loss"),
        ({}, "eval_loss", "loss"),
    ],
)
def test_which_metric_it_is(caplog, metrics, wanted, chosen):
    measured = metric_row({"a": None}, measures(**metrics), wanted)
    assert measured == Measured(chosen, {"a": metrics.get(chosen, 1.5)})
    assert not caplog.text


def test_what_cannot_be_told_is_said(caplog):
    assert metric_row({"a": None}, measures(f1=0.4, em=0.3), None) == Measured("loss", {"a": 1.5})
    assert "Evaluation returns em, f1, and none of them is called 'accuracy': the matrix is of the loss" in caplog.text
    assert metric_row({"a": None}, measures(accuracy=0.5), "f1") == Measured("accuracy", {"a": 0.5})
    assert "metric_for_best_model='f1' is not among what evaluation returns" in caplog.text
    assert metric_row({}, measures(), "f1") == Measured(None, {})


@pytest.mark.parametrize("value", [None, "good", [1, 2]])
def test_what_is_no_number_is_named(value):
    with pytest.raises(ValueError, match=r"returned .* as the accuracy of 'a', expected a number"):
        metric_row({"a": None}, measures(accuracy=value), None)


def test_tasks_without_a_set_are_named(caplog):
    warn_of_missing_sets({"b": 1}, ["a", "b", "c"])
    assert "no set for a, c: what is left of them is not measured" in caplog.text
    caplog.clear()
    for sets in ({"a": 1, "b": 1, "c": 1}, {}, None):
        warn_of_missing_sets(sets, ["a", "b", "c"])
    assert not caplog.text


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
