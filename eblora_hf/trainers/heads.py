"""The head with which each task of a sequence is trained and measured."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers.utils import logging

from ..adapters.composition import load_adapter, with_heads
from ..adapters.heads import (
    keep_rows,
    label_layer,
    name_labels,
    original_heads,
    with_fresh_rows,
    without_rows,
    wrapped_heads,
)
from ..adapters.states import heads_of
from ..published.index import Heads
from ..published.sequence import PublishedSequence
from ..tasks import TaskSequence
from .labels import check_label_numbers, set_labels, task_labels

_NO_LOGIT = -1e4  # its exponential is zero; half precision holds it

logger = logging.get_logger(__name__)


class TaskHeads:
    """
    Gives every task the head that belongs to it.

    Args:
        model (`PeftModel`): The model, with `modules_to_save`.
        adapter (`str`): The adapter that is trained.
        mode (`str`): `"shared"`: one head, trained on from task to task. `"per-task"`: each has a fresh one for its
            own labels. `"grow"`: one over the labels of all tasks so far; those of earlier tasks stay as they are.
        tasks ([`TaskSequence`], *optional*): The tasks of the run.

    Attributes:
        labels (`dict[str, list[str]]`): Names of the labels by task, where they are known.
        layer (`str`, *optional*): The linear layer with one output a label, whose size is a task's own; `None` for a
            shared head.
        current (`str`, *optional*): The task whose data are being used.
        data_labels (`list[str]`, *optional*): Labels of those data by their numbers, where the head has others.

    Raises:
        ValueError: if labels are needed and unknown, do not fit the head or the data, or there is no such head.
    """

    def __init__(self, model: PeftModel, adapter: str, mode: Heads, tasks: TaskSequence | None):
        self.model, self.adapter, self.mode = model, adapter, mode
        self.base_model = model.get_base_model()
        self.current: str | None = None
        self.data_labels: list[str] | None = None
        self.learnt: list[str] = []
        self.labels: dict[str, list[str]] = {}
        self.declared = list(getattr(model.peft_config[adapter], "modules_to_save", None) or [])
        self.layer = label_layer(self.base_model, self.declared) if self.own else None
        if self.own and self.layer is None:
            raise ValueError(
                f"EBLoRAConfig(heads={mode!r}) gives tasks heads of their own size, but no linear layer with an "
                f"output for each of the model's labels is among its heads ({', '.join(self.declared) or 'none'}). "
                "Name it in LoraConfig(modules_to_save=[…])."
            )
        for task in tasks or ():
            labels = task_labels(task)
            if labels is not None:
                self.labels[task.name] = labels
        self._check(tasks)

    @property
    def own(self) -> bool:
        """Whether tasks have heads of their own size."""
        return self.mode != "shared"

    def _check(self, tasks: TaskSequence | None) -> None:
        outputs = getattr(getattr(self.base_model, "config", None), "num_labels", None)
        classifies = type(self.base_model).__name__.endswith("Classification")
        for task in tasks or ():
            labels = self.labels.get(task.name)
            if self.own and labels is None:
                raise ValueError(
                    f"EBLoRAConfig(heads={self.mode!r}) needs the labels of every task, but {task.name!r} does not "
                    "say its own. Pass Task(…, labels=['first', 'second', …]), or a data set whose column has a "
                    "ClassLabel."
                )
            if self.own and labels and len(labels) < 2:
                raise ValueError(
                    f"The task {task.name!r} has the one label {labels[0]!r}: with heads={self.mode!r} there is "
                    "nothing to tell it from. Give it two or more."
                )
            shown = set_labels(task.eval_dataset)
            if self.mode == "per-task" and shown and labels and shown != labels:
                raise ValueError(
                    f"The evaluation set of {task.name!r} has the labels {', '.join(shown):.200} by their numbers, "
                    f"and its training set {', '.join(labels):.200}. Bring them into one order "
                    "(`align_labels_with_mapping`)."
                )
            if not self.own and labels and classifies and outputs and len(labels) > outputs > 1:
                raise ValueError(
                    f"The task {task.name!r} has the {len(labels)} labels {', '.join(labels):.200}, but the model's "
                    f"head has {outputs}. Load the model with `num_labels={len(labels)}`, or pass "
                    "EBLoRAConfig(heads='per-task') for a head of its own for every task, or heads='grow' for one "
                    "head over all labels."
                )
            count = len(labels) if labels else outputs
            if classifies and count and count > 1:
                for dataset in (task.train_dataset, task.eval_dataset):
                    check_label_numbers(task, dataset, count, one_a_row=self.mode == "grow")
        if not self.own and len({tuple(labels) for labels in self.labels.values()}) > 1:
            logger.warning(
                "The tasks have different labels, but one head for all, which is trained on from task to task: what "
                "is published answers with the last task's. EBLoRAConfig(heads='per-task') or 'grow' keeps them apart."
            )

    def go_on_from(self, published: PublishedSequence) -> None:
        """Takes over the labels of the tasks that a sequence has learnt. Raises if it has another kind of heads."""
        if published.tasks and published.heads != self.mode:
            raise ValueError(
                f"The sequence in {published.folder} has heads={published.heads!r}, and this run heads={self.mode!r}. "
                f"Pass EBLoRAConfig(heads={published.heads!r})."
            )
        self.learnt = published.names
        self.labels |= {task.name: task.labels for task in published.tasks if task.labels}

    def of_head(self, task: str) -> list[str]:
        """The labels of the head that a task has been, or is, trained with, in the order of its rows."""
        if self.mode != "grow":
            return self.labels.get(task, [])
        until = self.learnt.index(task) + 1 if task in self.learnt else len(self.learnt)
        names = [*self.learnt[:until], *([task] if task in self.labels and task not in self.learnt else [])]
        return list(dict.fromkeys(label for name in names for label in self.labels[name]))

    def put(self, task: str, published: PublishedSequence, seed: int) -> None:
        """Puts the head of a new task on the model; a shared one stays what it is."""
        if self.layer is None:
            return
        if self.mode == "grow" and self.learnt:
            state = heads_of(published.adapters(self.learnt[-1:])[0])
        else:
            state = without_rows(original_heads(self.model), self.layer)
        std = getattr(self.base_model.config, "initializer_range", 0.02)
        labels = self.of_head(task)
        load_adapter(self.model, self.adapter, with_fresh_rows(state, self.layer, len(labels), std, seed))
        name_labels(self.base_model, labels)

    def name_newest(self) -> None:
        """Has the model know the labels of the head that the root carries."""
        if self.own and self.learnt:
            name_labels(self.base_model, self.of_head(self.learnt[-1]))

    def can_measure(self, name: str) -> bool:
        """Whether there is a head for the set of that name: not if it is of a task that is not learnt yet."""
        return not self.own or name not in self.labels or name in self.learnt or name == self.current

    @contextlib.contextmanager
    def as_learnt(self, name: str, published: PublishedSequence) -> Iterator[None]:
        """Within the context data are those of a task, and the model has the head that the task was learnt with."""
        heads = heads_of(published.adapters([name])[0]) if name in self.learnt and self.mode != "grow" else {}
        named = self._named(self.of_head(name)) if heads and self.own else contextlib.nullcontext()
        with self.with_task(name), with_heads(self.model, self.adapter, heads), named:
            yield

    @contextlib.contextmanager
    def with_task(self, name: str) -> Iterator[None]:
        """Within the context data are those of a task."""
        before, self.current = self.current, name
        try:
            with self.with_data(self.labels.get(name)):
                yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def with_data(self, labels: list[str] | None) -> Iterator[None]:
        """Within the context data have these labels, by their numbers."""
        before, self.data_labels = self.data_labels, labels
        try:
            yield
        finally:
            self.data_labels = before

    @contextlib.contextmanager
    def _named(self, labels: list[str]) -> Iterator[None]:
        before = list(self.base_model.config.id2label.values())
        name_labels(self.base_model, labels)
        try:
            yield
        finally:
            name_labels(self.base_model, before)

    def numbered(self, inputs: Any) -> Any:
        """A batch with labels by the rows of a growing head, instead of their numbers in the data."""
        if self.mode != "grow" or not self.data_labels or not hasattr(inputs, "items"):
            return inputs
        rows = list(self.base_model.config.id2label.values())
        numbers = torch.tensor([rows.index(label) if label in rows else -1 for label in self.data_labels])
        result = dict(inputs)
        for name in ("labels", "label"):
            labels = result.get(name)
            if isinstance(labels, torch.Tensor) and not labels.is_floating_point():
                if labels.numel() and labels.max() >= len(numbers):
                    raise ValueError(
                        f"A row has the label {int(labels.max())}, but the data have the labels 0 to "
                        f"{len(numbers) - 1}: {', '.join(self.data_labels):.200}."
                    )
                known = torch.where(labels >= 0, numbers.to(labels.device)[labels.clamp_min(0)], labels)
                if not torch.equal(known < 0, labels < 0):
                    missing = sorted(set(self.data_labels) - set(rows))
                    raise ValueError(f"The head has no labels {', '.join(missing)}: no task has taught them.")
                result[name] = known
        return result

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """
        Within the context a growing head answers with the task's labels alone: its data teach nothing about the others
        but that they are all wrong.
        """
        own = self.labels.get(self.current or "", []) if self.mode == "grow" and self.learnt else []
        rows = self.of_head(self.current) if self.current and own else []
        hook = partial(_without, torch.tensor([label not in own for label in rows]))
        handles = [layer.register_forward_hook(hook) for layer in (self._label_layers() if own else [])]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def set_trainable(self) -> None:
        """Freezes all of a growing head but its label layer, once there are labels whose answers would change."""
        if self.mode == "grow" and self.learnt:
            for name, wrapper in wrapped_heads(self.model).items():
                for part, parameter in wrapper.modules_to_save[self.adapter].named_parameters():
                    parameter.requires_grad_(f"{name}.{part}".rpartition(".")[0] == self.layer)

    def hold(self, optimizer: torch.optim.Optimizer) -> None:
        """Has rows of earlier labels stay what they are under an optimizer."""
        if self.mode == "grow" and self.learnt:
            for layer in self._label_layers():
                keep_rows(optimizer, layer, len(self.of_head(self.learnt[-1])))

    def _label_layers(self) -> list[torch.nn.Module]:
        """The label layer of the head that is trained."""
        return [
            module
            for name, wrapper in wrapped_heads(self.model).items()
            for part, module in wrapper.modules_to_save[self.adapter].named_modules()
            if f"{name}.{part}".rstrip(".") == self.layer
        ]


def _without(others: torch.Tensor, layer: torch.nn.Module, inputs: tuple, logits: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(others.to(logits.device), _NO_LOGIT)
