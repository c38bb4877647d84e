"""What one task has of its own: a fresh adapter beside the earlier tasks, and the arguments of its training."""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.trainer_utils import TrainOutput

from ..adapters.composition import concatenate, set_ranks
from ..adapters.earlier_tasks import EarlierTasks
from ..adapters.layers import AdaptedLayer, find_layers
from ..adapters.sharding import scatter, trains_shards
from ..adapters.states import AdapterState, heads_of
from ..adapters.switches import keep_heads_before
from ..methods.base import Method
from ..methods.build import build_method
from ..tasks import Task
from .processes import spread_over_processes
from .surface import TrainerSurface


def put_fresh_adapter(
    model: PeftModel, adapter: str, earlier_tasks: EarlierTasks, finished: list[AdapterState], method: Method
) -> tuple[list[AdaptedLayer], dict[str, float | str]]:
    """
    Puts the finished tasks on a model, and beside them an adapter whose update is zero.

    Args:
        model (`PeftModel`): The model, with the adapter of the task before or a fresh one.
        adapter (`str`): Its name.
        earlier_tasks ([`EarlierTasks`]): Puts them there.
        finished (`list[dict[str, torch.Tensor]]`): Folded adapters of the finished tasks.
        method ([`Method`]): Says which ranks the task has.

    Returns:
        `tuple` of the layers of the fresh adapter, and what [`EarlierTasks.put`] says; empty without finished tasks.
    """
    earlier_tasks.take_off(model)
    layers, record = find_layers(model, adapter), {}
    if finished:
        record = earlier_tasks.put(model, layers, concatenate(finished))
        layers = find_layers(model, adapter)
    ranks = spread_over_processes(method.ranks, layers)
    if ranks:
        set_ranks(model, adapter, ranks)
        layers = find_layers(model, adapter)
    for layer in layers:
        torch.nn.init.zeros_(layer.lora_B)
    if finished and not trains_shards(model):
        keep_heads_before(model, heads_of(finished[-1]))
    return layers, record


def draw_lora_A(layers: list[AdaptedLayer]) -> None:
    """Draws lora_A anew, as PEFT does."""
    for layer in layers:
        fresh = torch.empty(layer.lora_A.shape, dtype=layer.lora_A.dtype, device=layer.lora_A.device)
        scatter(torch.nn.init.kaiming_uniform_(fresh, a=5**0.5).unsqueeze(0), [layer.lora_A])


@contextlib.contextmanager
def as_task(trainer: TrainerSurface, task: Task, checkpoints: Path) -> Iterator[None]:
    """
    Within the context a trainer has the data of a task, its length and rates, and a folder for its checkpoints.

    Args:
        trainer (`Trainer`): The trainer, with our mixins.
        task ([`Task`]): The task.
        checkpoints (`Path`): Folder of its checkpoints.
    """
    names = ("args", "train_dataset", "eval_dataset", "eblora_config", "method", "optimizer_cls_and_kwargs")
    before = {name: getattr(trainer, name) for name in names}
    args, optimizer = copy.copy(trainer.args), trainer.optimizer_cls_and_kwargs
    args.output_dir = str(checkpoints)
    if task.num_train_epochs is not None:
        args.num_train_epochs, args.max_steps = task.num_train_epochs, -1
    if task.max_steps is not None:
        args.max_steps = task.max_steps
    if task.learning_rate is not None:
        args.learning_rate = task.learning_rate
        if optimizer is not None:
            optimizer = (optimizer[0], optimizer[1] | {"lr": task.learning_rate})
    rates = {name: getattr(task, name) for name in ("direction_lr", "scale_lr") if getattr(task, name) is not None}
    evaluation = before["eval_dataset"] if task.eval_dataset is None else task.eval_dataset
    config = trainer.eblora_config
    if task.head_learning_rate is not None:
        config = dataclasses.replace(config, head_learning_rate=task.head_learning_rate)
    method = build_method(dataclasses.replace(config, **rates))
    _assign(trainer, dict(zip(names, (args, task.train_dataset, evaluation, config, method, optimizer), strict=True)))
    try:
        with trainer.heads.with_task(task.name):
            yield
    finally:
        _assign(trainer, before)


def _assign(trainer: TrainerSurface, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(trainer, name, value)
    vars(trainer).pop("_eval_dataloaders", None)  # persistent workers keep them, of another task's set


def joined_output(outputs: list[TrainOutput], continual_metrics: dict[str, float]) -> TrainOutput:
    """
    What `train` returns for several tasks.

    Args:
        outputs (`list[TrainOutput]`): What the parent's `train` returned for each; empty if all were there already.
        continual_metrics (`dict[str, float]`): Of the accuracy matrix; NaN where one is not defined.

    Returns:
        `TrainOutput`: All steps, the mean loss of a step, and the metrics of the last task with those of the matrix.
    """
    steps = sum(output.global_step for output in outputs)
    loss = sum(output.training_loss * output.global_step for output in outputs) / max(steps, 1)
    metrics = dict(outputs[-1].metrics) if outputs else {}
    metrics |= {f"train_{name}": value for name, value in continual_metrics.items() if not math.isnan(value)}
    return TrainOutput(steps, loss, metrics)
