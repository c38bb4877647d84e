"""A row of the matrix: one metric of all evaluation sets at the end of a task, earlier tasks with their own head."""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from transformers import EarlyStoppingCallback
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

logger = logging.get_logger(__name__)

_LOGGED = ("accuracy", "rewards/accuracies", "mean_token_accuracy")  # what TRL's trainers log and do not return
_PARENTS = {  # what `Trainer.evaluate` returns of itself
    *("loss", "runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time"),
    *("jit_compilation_time", "num_tokens", "entropy", *_LOGGED[1:]),
}


def sets_to_measure(eval_dataset: Any, task: str, *, alone: bool) -> dict[str, Any]:
    """
    Evaluation sets by name: a dict as it is, and one plain set under the name of the task if that task is `alone`.
    """
    if isinstance(eval_dataset, dict):
        return eval_dataset
    return {task: eval_dataset} if alone and eval_dataset is not None else {}


@dataclass
class Measured:
    """
    A row of the matrix.

    Args:
        metric (`str`, *optional*): What was measured; `None` if nothing was.
        row (`dict[str, float]`): Its values by the name of the set, earlier tasks with the head they were learnt with.
        root_row (`dict[str, float]`, *optional*): The same with the newest head, if that is another.
    """

    metric: str | None
    row: dict[str, float]
    root_row: dict[str, float] | None = None


def metric_row(
    sets: dict[str, Any],
    evaluate: Callable[[dict[str, Any]], dict[str, float]],
    wanted: str | None,
    head_of: Callable[[str], AbstractContextManager] = contextlib.nullcontext,
) -> Measured:
    """
    Evaluates each set and takes one number out of what was measured: the same metric of all.

    Args:
        sets (`dict`): Evaluation sets by name.
        evaluate (`Callable`): `Trainer.evaluate`, called with one set in a dict: returns `eval_<name>_<metric>`.
        wanted (`str`, *optional*): `metric_for_best_model`, with or without `eval_`.
        head_of (`Callable`): A context within which the model has the head that belongs to a set.

    Returns:
        [`Measured`]: Of values that are finite. The metric is the wanted one unless that is the loss, `accuracy`, the
        only one that `compute_metrics` returns, TRL's `rewards/accuracies` or `mean_token_accuracy`, or `loss`, the
        first that there is. It is `None` without a set.
    """
    measured: dict[str, dict[str, float]] = {}
    for name, dataset in sets.items():
        with head_of(name):
            results = evaluate({name: dataset})
        measured[name] = {key.removeprefix(f"eval_{name}_"): value for key, value in results.items()}
    metric = _choose(measured, (wanted or "").removeprefix("eval_"))
    row = {name: _number(values[metric], metric, name) for name, values in measured.items() if metric in values}
    infinite = sorted(name for name, value in row.items() if not math.isfinite(value))
    if infinite:
        logger.warning(f"The {metric} of {', '.join(infinite)} is no finite number: it has no place in the matrix.")
    return Measured(metric, {name: value for name, value in row.items() if name not in infinite})


def _number(value: Any, metric: str, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`compute_metrics` returned {value!r:.60} as the {metric} of {name!r}, expected a number."
        ) from error


def _choose(measured: dict[str, dict[str, float]], wanted: str) -> str | None:
    """The metric of a row."""
    names = {metric for values in measured.values() for metric in values}
    own = sorted(name for name in names if name not in _PARENTS and not name.startswith("eval_"))
    if wanted not in ("", "loss", *names) and measured:
        logger.warning(
            f"metric_for_best_model={wanted!r} is not among what evaluation returns: {', '.join(sorted(names))}."
        )
    if len(own) > 1 and not {wanted, "accuracy"} & set(own):
        logger.warning(
            f"Evaluation returns {', '.join(own)}, and none of them is called 'accuracy': the matrix is of the loss. "
            "Name one with `metric_for_best_model`."
        )
    candidates = ["" if wanted == "loss" else wanted, "accuracy", *(own if len(own) == 1 else []), *_LOGGED, "loss"]
    return next((name for name in candidates if name in names), None)


def with_logged(results: dict[str, float], name: str, history: list[dict[str, Any]]) -> dict[str, float]:
    """What was measured on a set, with the accuracies that TRL's trainers only log."""
    entry = history[-1] if history else {}
    return {f"eval_{name}_{key}": entry[f"eval_{key}"] for key in _LOGGED if f"eval_{key}" in entry} | results


def warn_of_missing_sets(sets: Any, tasks: list[str]) -> None:
    """Says which tasks have no evaluation set, if others have one: the matrix has no numbers in their columns."""
    missing = [name for name in tasks if isinstance(sets, dict) and name not in sets]
    if missing and sets:
        logger.warning(
            f"`eval_dataset` has no set for {', '.join(missing)}: what is left of them is not measured, and means are "
            "over the others."
        )


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
