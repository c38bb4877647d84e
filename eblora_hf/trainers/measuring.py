"""Evaluating a sequence: each set with the head that belongs to it, while a task trains and afterwards."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PredictionOutput
from transformers.utils import logging

from ..adapters.composition import EARLIER_TASKS, concatenate, put_earlier_tasks
from ..adapters.earlier_tasks import EarlierTasks
from ..adapters.leftovers import begin_run
from ..published.adapter_files import check_fits
from ..published.plain_lora import Adapter
from ..tasks import Task
from .adoption import read_source
from .callback import TaskSequenceCallback
from .evaluation import (
    Measured,
    metric_row,
    sets_to_measure,
    warn_of_missing_sets,
    with_logged,
    without_early_stopping,
)
from .labels import set_labels
from .surface import TrainerSurface

logger = logging.get_logger(__name__)


class MeasuringMixin(TrainerSurface):
    """
    Overrides what a `Trainer` calls to evaluate, so that it is the sequence that is measured, with the right heads.

    Attributes:
        earlier_tasks ([`EarlierTasks`]): The updates of earlier tasks on the model.
        source (`str` or `Path`, *optional*): The published sequence that is continued.
    """

    earlier_tasks: EarlierTasks
    source: str | Path | None

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """
        `Trainer.evaluate` of the sequence; before `train`, of the one in `sequence=`.

        Where tasks have heads of their own, a dict of sets is by the names of tasks, and each is measured with its
        head; a set of a task that is not learnt yet is left out.
        """
        self.put_sequence()
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if not (self.heads.own and isinstance(sets, dict)):
            with self._labels_of(sets):
                return super().evaluate(eval_dataset, *args, **kwargs)
        metrics: dict[str, float] = {}
        for name, dataset in sets.items():
            if self.heads.can_measure(name):
                with self._head_of(name, dataset):
                    metrics |= super().evaluate({name: dataset}, *args, **kwargs)
        return metrics

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        """`Trainer.predict` with the sequence; before `train`, with the one in `sequence=`."""
        self.put_sequence()
        with self._labels_of(test_dataset):
            return super().predict(test_dataset, *args, **kwargs)

    @contextlib.contextmanager
    def _head_of(self, name: str, dataset: Any) -> Iterator[None]:
        """Within the context the model has the head that belongs to a set: its task's, or one with its labels."""
        if name not in self.heads.labels or self.task_callback is None:
            with self._labels_of(dataset):
                yield
            return
        shown = set_labels(dataset) if self.heads.mode == "grow" else None
        with self.heads.as_learnt(name, self.begun.sequence), self.heads.with_data(shown or self.heads.labels[name]):
            yield

    def _labels_of(self, dataset: Any) -> AbstractContextManager:
        """Within the context the labels are those that a set says, if it says any and no task is known to own it."""
        shown = set_labels(dataset) if self.heads.own and not isinstance(dataset, str) else None
        if shown is None:
            if self.heads.mode == "grow" and self.heads.current is None and self.heads.learnt and dataset is not None:
                logger.warning(
                    "The data set does not say its labels (ClassLabel), so that its numbers are taken for rows of the "
                    "head. Pass it in a dict under the name of its task."
                )
            return contextlib.nullcontext()
        if self.heads.mode == "grow":
            return self.heads.with_data(shown)
        owners = [task for task in self.heads.learnt if self.heads.labels.get(task) == shown]
        if not owners or self.heads.current is not None:
            return contextlib.nullcontext()
        return self.heads.as_learnt(owners[-1], self.begun.sequence)

    def put_sequence(self) -> None:
        """
        Puts the sequence in `sequence=` on the model, beside the adapter that is to be trained, unless `train` has
        begun.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if a file of it was changed, or it is of another model.
        """
        if self.source is None or self.task_callback is not None or EARLIER_TASKS in self.model.peft_config:
            return
        with self.args.main_process_first(desc="fetching the sequence"):
            published = read_source(self.source, self.args.hub_token)
        base_model = self.model.get_base_model()
        if isinstance(published, Adapter):
            check_fits(published.state, published.config.modules_to_save or [], base_model, published.source)
            begin_run(self.model, self.adapter)
            put_earlier_tasks(self.model, self.adapter, published.state)
            return
        published.check_base_model(base_model)
        published.check_adapters(base_model)
        self.heads.go_on_from(published)
        begin_run(self.model, self.adapter)
        put_earlier_tasks(self.model, self.adapter, concatenate(published.adapters()))
        self.heads.name_newest()
        self.task_callback = TaskSequenceCallback(published, keeps_bases=False)

    @contextlib.contextmanager
    def pretrained_model(self) -> Iterator[Any]:
        """
        Within the context the model is the pre-trained one, whatever has been learnt on it.

        `model.disable_adapter()` gives the model before the task while one is learnt, with all earlier tasks.
        """
        self.put_sequence()
        with self.earlier_tasks.away(self.model):
            yield self.model

    def _prepare_inputs(self, inputs: Any) -> Any:
        return super()._prepare_inputs(self.heads.numbered(inputs))

    def measure(self, task: Task) -> Measured:
        """The row of the matrix for a task whose training has ended."""
        published = self.begun.sequence
        alone = self.tasks is not None and len(self.tasks) == 1 and self.compute_metrics is not None
        sets = sets_to_measure(self.eval_dataset, task.name, alone=alone)
        warn_of_missing_sets(sets, [*published.names, task.name])

        def evaluate(one: dict[str, Any]) -> dict[str, float]:
            return with_logged(self.evaluate(one), next(iter(one)), self.state.log_history)

        def head_of(name: str) -> AbstractContextManager:
            return self.heads.as_learnt(name, published)

        wanted = self.args.metric_for_best_model
        with without_early_stopping(self.callback_handler), self.heads.with_task(task.name):
            sets = {name: dataset for name, dataset in sets.items() if self.heads.can_measure(name)}
            measured = metric_row(sets, evaluate, wanted, contextlib.nullcontext if self.heads.own else head_of)
            trained = set(published.names) if self.heads.declared and not self.heads.own else set()
            earlier = {name: dataset for name, dataset in sets.items() if name in trained}
            if earlier:
                measured.root_row = measured.row | metric_row(earlier, evaluate, measured.metric).row
        return measured
