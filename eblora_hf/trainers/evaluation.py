"""The row of the accuracy matrix: all evaluation sets at the end of a task, earlier tasks with their own head."""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from transformers import EarlyStoppingCallback
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

logger = logging.get_logger(__name__)


def sets_to_measure(eval_dataset: Any, task: str, *, alone: bool) -> dict[str, Any]:
    """
    Evaluation sets by name: a dict as it is, and one plain set under the name of the task if that task is `alone`.
    """
    if isinstance(eval_dataset, dict):
        return eval_dataset
    return {task: eval_dataset} if alone and eval_dataset is not None else {}


def accuracy_row(
    sets: dict[str, Any],
    evaluate: Callable[[dict[str, Any]], dict[str, float]],
    metrics: list[str],
    head_of: Callable[[str], AbstractContextManager] = contextlib.nullcontext,
    *,
    expected: bool = False,
) -> dict[str, float]:
    """
    Evaluates each set and takes one number out of what was measured.

    Args:
        sets (`dict`): Evaluation sets by name.
        evaluate (`Callable`): `Trainer.evaluate`, called with one set in a dict: returns `eval_<name>_<metric>`.
        metrics (`list[str]`): Names of the metric to take, the first that there is; never the loss.
        head_of (`Callable`): A context within which the model has the head that belongs to a set.
        expected (`bool`, defaults to `False`): Whether to warn if none of the sets gives a number.

    Returns:
        `dict[str, float]`: By the name of the set, where there is a finite number.
    """
    wanted = [metric for metric in metrics if metric != "loss"]
    row, seen = {}, set()
    for name, dataset in sets.items():
        with head_of(name):
            measured = evaluate({name: dataset})
        seen |= {key.removeprefix(f"eval_{name}_") for key in measured}
        values = [float(measured[key]) for key in (f"eval_{name}_{metric}" for metric in wanted) if key in measured]
        if values and math.isfinite(values[0]):
            row[name] = values[0]
    if sets and not row and expected:
        logger.warning(
            f"The accuracy matrix stays empty: evaluation returns {', '.join(sorted(seen))}, and none of them is "
            f"called {' or '.join(map(repr, metrics))}. Return it from `compute_metrics`, or name another one with "
            "`metric_for_best_model`."
        )
    return row


@contextlib.contextmanager
def without_early_stopping(handler: CallbackHandler) -> Iterator[None]:
    """Within the context no early stopping looks for its metric in every evaluation."""
    stopping = [callback for callback in handler.callbacks if isinstance(callback, EarlyStoppingCallback)]
    for callback in stopping:
        handler.callbacks.remove(callback)
    try:
        yield
    finally:
        handler.callbacks.extend(stopping)
