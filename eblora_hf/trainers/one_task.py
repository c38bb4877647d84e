"""
Learning one task of a sequence inside a `Trainer`: a fresh adapter, the parent's loop, what is remembered, what it
reached.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, set_seed
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..adapters.composition import (
    concatenate,
    folded_adapter,
    heads_of,
    replace_adapter,
    set_ranks,
    with_heads,
)
from ..adapters.earlier_tasks import EarlierTasks
from ..adapters.layers import find_layers
from ..adapters.sharding import scatter
from ..config import Task, TaskSequence
from ..methods.base import Snapshot
from ..methods.build import build_method
from ..published.sequence import PublishedSequence
from .callback import TaskSequenceCallback, training_record
from .constrained import ConstrainedMixin
from .processes import check_same_everywhere, spread_over_processes
from .publisher import PublishingMixin

logger = logging.get_logger(__name__)


class OneTaskMixin(PublishingMixin, ConstrainedMixin):
    """
    Runs the parent's `train` for one task, and everything around it that a sequence needs.

    Attributes:
        tasks ([`TaskSequence`]): The tasks of this run.
        task_callback ([`TaskSequenceCallback`], *optional*): The bases and the published sequence.
        earlier_tasks ([`EarlierTasks`]): Puts the updates of finished tasks on the model.
    """

    tasks: TaskSequence
    earlier_tasks: EarlierTasks
    task_callback: TaskSequenceCallback | None

    def _checkpoint_folder(self, task: Task) -> Path:
        return Path(self.args.output_dir) / "checkpoints" / task.name

    def _learn(self, task: Task, checkpoint: str | None, trial: Any, ignore_keys: list[str] | None) -> TrainOutput:
        published, index = self.task_callback.sequence, len(self.task_callback.sequence.tasks)
        logger.info(f"***** Task {index}: {task.name} *****")
        if self.args.should_save:
            self._checkpoint_folder(task).mkdir(parents=True, exist_ok=True)  # from here on there is a run to resume
        self._reset(published)
        seed = self.args.seed + index
        set_seed(seed)
        if checkpoint is None:
            for layer in self.layers:  # as PEFT draws it
                fresh = torch.empty(layer.lora_A.shape, dtype=layer.lora_A.dtype, device=layer.lora_A.device)
                scatter(torch.nn.init.kaiming_uniform_(fresh, a=5**0.5).unsqueeze(0), [layer.lora_A])
            self.start_from(self._decompose(self.method.begin_task, self.method.starts_from, task, seed))
        else:
            self.resume_from(checkpoint)
        check_same_everywhere(self.start_tensors())
        self.task_callback.begin_task(task.name)
        set_seed(seed)
        with self._arguments_of(task):
            output = super().train(checkpoint, trial, ignore_keys)  # the trainer's own loop
        learning_record = training_record(task, self.eblora_config, self.args, self.optimizer, self.constraint)
        if self.earlier_record:
            learning_record["earlier_tasks"] = self.earlier_record
        self.method.finish_training(self.layers)
        factors = self.constraint.factors() if self.constraint is not None else {}
        accuracies = self._accuracies(task)
        self.unwrap()
        with self._kept_if_it_fails(task):
            extensions = self._decompose(self.method.end_task, self.method.remembers, task, seed)
            adapter = folded_adapter(self.model, self.layers, factors)
            columns = {f"the basis of {name}": extension.columns for name, extension in extensions.items()}
            check_same_everywhere(adapter | columns)
            self.task_callback.end_task(
                adapter,
                self.model.peft_config[self.adapter],
                extensions,
                steps=self.state.global_step,
                metrics=accuracies,
                training=learning_record,
                write=self.args.should_save,
            )
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.publisher.publish(self.task_callback.sequence)
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            self.task_callback.sequence = PublishedSequence.open(self.args.output_dir)
        return output

    def _decompose(self, answer: Callable, of: Snapshot | None, task: Task, seed: int) -> dict[str, Any]:
        """What the method answers of a snapshot of the task, which is let go again."""
        snapshot = self.snapshot(task.train_dataset, seed, of)
        return spread_over_processes(lambda share: answer(share, snapshot, self.bases), self.layers)

    def _reset(self, published: PublishedSequence) -> None:
        """A fresh adapter beside the earlier tasks, and a trainer that remembers nothing of the task before."""
        self.unwrap()
        self.shard()
        self.layers = find_layers(self.model, self.adapter)
        self.earlier_record = {}
        if published.tasks:
            self.earlier_record = self.earlier_tasks.put(self.model, self.layers, concatenate(published.adapters()))
            self.layers = find_layers(self.model, self.adapter)
        ranks = spread_over_processes(self.method.ranks, self.layers)
        if ranks:
            set_ranks(self.model, self.adapter, ranks)
            self.layers = find_layers(self.model, self.adapter)
        for layer in self.layers:
            torch.nn.init.zeros_(layer.lora_B)
        self.start_from({})
        if self._given_optimizer is None:
            self.optimizer, self.lr_scheduler = None, None
        elif self.optimizer is not self._given_optimizer:
            raise ValueError(
                "The optimizer passed in `optimizers` has been used by an earlier `train()`, and its moments with "
                "it. Make a new trainer, or pass `optimizer_cls_and_kwargs`."
            )
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = 0

    @contextlib.contextmanager
    def _arguments_of(self, task: Task) -> Iterator[None]:
        """Within the context the trainer has the task's data, folder, length and rates."""
        before = self.args, self.train_dataset, self.eval_dataset, self.method, self.optimizer_cls_and_kwargs
        args = copy.copy(self.args)
        args.output_dir = str(self._checkpoint_folder(task))
        if task.num_train_epochs is not None:
            args.num_train_epochs, args.max_steps = task.num_train_epochs, -1
        if task.max_steps is not None:
            args.max_steps = task.max_steps
        optimizer = self.optimizer_cls_and_kwargs
        if task.learning_rate is not None:
            args.learning_rate = task.learning_rate
            if optimizer is not None:
                optimizer = (optimizer[0], optimizer[1] | {"lr": task.learning_rate})
        rates = {name: getattr(task, name) for name in ("direction_lr", "scale_lr") if getattr(task, name) is not None}
        try:
            self._forget_loaders()
            self.args, self.train_dataset, self.optimizer_cls_and_kwargs = args, task.train_dataset, optimizer
            if task.eval_dataset is not None:
                self.eval_dataset = task.eval_dataset
            self.method = build_method(dataclasses.replace(self.eblora_config, **rates))
            yield
        finally:
            self.args, self.train_dataset, self.eval_dataset, self.method, self.optimizer_cls_and_kwargs = before
            self._forget_loaders()

    def _forget_loaders(self) -> None:
        """Drops the evaluation loaders that persistent workers keep: they are of another task's set."""
        self.__dict__.pop("_eval_dataloaders", None)

    @contextlib.contextmanager
    def _kept_if_it_fails(self, task: Task) -> Iterator[None]:
        """
        Within the context an error leaves a checkpoint of the trained task, from which resuming redoes only the end.
        """
        try:
            yield
        except Exception:
            with self._arguments_of(task):
                self.is_in_train = True
                self._save_checkpoint(self.model, trial=None)
                self.is_in_train = False
            logger.error(f"The task {task.name!r} is trained and kept in {self._checkpoint_folder(task)}.")
            raise

    def _accuracies(self, task: Task) -> dict[str, float]:
        """Evaluates all sets and returns the row of the accuracy matrix: accuracy by task name, where there is one."""
        sets = self.eval_dataset
        if not isinstance(sets, dict):  # one plain set says something of one task, and only with metrics
            sets = {task.name: sets} if len(self.tasks) == 1 and sets is not None and self.compute_metrics else {}
        wanted = [name.removeprefix("eval_") for name in (self.args.metric_for_best_model, "accuracy") if name]
        published, row, seen = self.task_callback.sequence, {}, set()
        stopping = [cb for cb in self.callback_handler.callbacks if isinstance(cb, EarlyStoppingCallback)]
        for callback in stopping:  # it would look for its metric in every set
            self.callback_handler.callbacks.remove(callback)
        try:
            for name, dataset in sets.items():
                # an earlier task is measured with the head it was learnt with
                head = heads_of(published.adapters([name])[0]) if name in published.names else {}
                with with_heads(self.model, self.adapter, head):
                    measured = self.evaluate({name: dataset})
                seen |= {key.removeprefix(f"eval_{name}_") for key in measured}
                keys = [f"eval_{name}_{metric}" for metric in wanted if metric != "loss"]
                values = [float(measured[key]) for key in keys if key in measured]
                if values and math.isfinite(values[0]):
                    row[name] = values[0]
        finally:
            self.callback_handler.callbacks.extend(stopping)
        named = self.args.metric_for_best_model not in (None, "loss", "eval_loss")
        if sets and not row and (self.compute_metrics is not None or named):
            logger.warning(
                f"The accuracy matrix stays empty: evaluation returns {', '.join(sorted(seen))}, and none of them is "
                f"called {' or '.join(map(repr, wanted))}. Return it from `compute_metrics`, or name another one with "
                "`metric_for_best_model`."
            )
        return row

    def _become_sum_of_tasks(self) -> None:
        """
        Leaves one adapter on the model, the sum of all tasks, so that whatever is saved next is all that was learnt.
        A sharded model keeps two, the last task's and the earlier ones': FSDP2 would not know of a new adapter.
        """
        published = self.task_callback.sequence
        self.unwrap()
        self.earlier_tasks.restore()
        if len(published.tasks) > 1 and not self.is_fsdp_enabled:
            replace_adapter(self.model, self.adapter, concatenate(published.adapters()))
            self.layers = find_layers(self.model, self.adapter)
        self.optimizer, self.lr_scheduler = None, None
