"""What happens between tasks: bases grow, the finished task is published, metrics are kept."""

import dataclasses
import platform
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..adapters.states import AdapterState, factors_of
from ..config import EBLoRAConfig
from ..manifold.penalty import Curvature, join_curvatures
from ..manifold.step_hooks import StepHooks
from ..memory.basis import BasisExtension, join_basis
from ..memory.budget import roots_within_budget, within_budget
from ..metrics import accuracy_matrix
from ..published.index import root_rows
from ..published.schema import as_plain
from ..published.sequence import PublishedSequence
from ..tasks import Task
from ..version import __version__

logger = logging.get_logger(__name__)


class TaskSequenceCallback(TrainerCallback):
    """
    Holds what outlives a task: the bases of all tasks so far and the published sequence. The trainer calls `end_task`.

    It also marks every entry of the log with the task it belongs to.

    Args:
        sequence ([`PublishedSequence`]): The sequence that tasks are appended to.
        keeps_bases (`bool`, defaults to `True`): Whether the method needs the bases of earlier tasks.
        basis_dtype (`torch.dtype`, defaults to `torch.float32`): How the columns of a task are stored.
        basis_budget (`float`, *optional*): Their size, at most, over that of the task's adapter in float32.

    Attributes:
        bases (`dict[str, torch.Tensor]`): Per layer name the orthonormal basis `(d_in, p)` of the tasks learnt so far.
        curvatures (`dict[str, Curvature]`): Per layer name that of the tasks for which there is one.
        task_name (`str`, *optional*): The task being learnt.
    """

    def __init__(
        self,
        sequence: PublishedSequence,
        keeps_bases: bool = True,
        basis_dtype: torch.dtype = torch.float32,
        basis_budget: float | None = None,
    ):
        self.sequence, self.basis_dtype, self.basis_budget = sequence, basis_dtype, basis_budget
        self.bases = sequence.bases() if keeps_bases else {}
        self._curvatures = sequence.curvatures() if keeps_bases else {}
        self.task_name: str | None = None  # while one is learnt

    @property
    def curvatures(self) -> dict[str, Curvature]:
        return {name: join_curvatures(tasks) for name, tasks in self._curvatures.items()}

    def begin_task(self, name: str) -> None:
        self.task_name = name

    def end_task(
        self,
        adapter: AdapterState,
        config: LoraConfig,
        extensions: dict[str, BasisExtension] | None,
        *,
        steps: int,
        metrics: dict[str, float],
        training: dict,
        root_metrics: dict[str, float] | None = None,
        labels: list[str] | None = None,
        write: bool = True,
    ) -> None:
        """
        Extends the bases and appends the task to the sequence.

        Args:
            adapter (`dict[str, torch.Tensor]`): The task's folded adapter.
            config (`LoraConfig`): The configuration it was trained with.
            extensions (`dict[str, BasisExtension]`, *optional*): What it adds to the basis of each layer, `None` if
                the method keeps none.
            steps (`int`), metrics (`dict[str, float]`), training (`dict`), root_metrics (`dict[str, float]`,
                *optional*), labels (`list[str]`, *optional*): For its record.
            write (`bool`, defaults to `True`): Whether this process writes files.
        """
        added = stored_columns(extensions or {}, adapter, self.basis_dtype, self.basis_budget)
        if added:
            training = training | {"bases": captured_by(added)}
        warn_of_caps(str(self.task_name), added, self.basis_budget)
        if write and self.task_name is not None:
            kept = None if extensions is None else added
            self.sequence.append(
                self.task_name,
                adapter,
                config,
                kept,
                steps=steps,
                metrics=metrics,
                training=training,
                labels=labels,
                root_metrics=root_metrics,
            )
        for name, extension in added.items():  # what a run that reads the files again will have
            self.bases[name] = join_basis(self.bases.get(name), extension.columns)
            if extension.beyond is not None and extension.outputs is not None:
                self._curvatures.setdefault(name, []).append(Curvature(extension.beyond, extension.outputs))
        self.task_name = None

    def accuracy_matrix(self) -> np.ndarray:
        """R[t][i], the accuracy on task i after learning task t, of shape `(T, T)`; NaN where it was not measured."""
        return accuracy_matrix(self.sequence.names, [task.metrics for task in self.sequence.tasks])

    def root_accuracy_matrix(self) -> np.ndarray:
        """The same with the head that the root carries after each task, which is what plain PEFT loads."""
        sequence = self.sequence
        return accuracy_matrix(sequence.names, root_rows(sequence.tasks, sequence.heads))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.task_name is not None and state.log_history:
            entry: dict[str, Any] = state.log_history[-1]
            entry["task"] = self.task_name


def stored_columns(
    extensions: dict[str, BasisExtension], adapter: AdapterState, dtype: torch.dtype, budget: float | None
) -> dict[str, BasisExtension]:
    """What is stored of the columns that a task adds beside its adapter: within a budget, in a dtype, on the CPU."""
    for name, a in factors_of(adapter, "lora_A").items():
        if name in extensions:
            x, count = extensions[name], roots_within_budget(len(a), budget, dtype.itemsize)
            roots = {side: getattr(x, side) for side in ("beyond", "outputs") if getattr(x, side) is not None}
            kept = {side: root[:, :count].contiguous() for side, root in roots.items()}
            extensions = extensions | {name: dataclasses.replace(x, **kept)}
    if budget is not None:
        factors = sum(x.numel() for kind in ("lora_A", "lora_B") for x in factors_of(adapter, kind).values())
        held = sum(x.numel() for e in extensions.values() for x in (e.beyond, e.outputs) if x is not None)
        extensions = within_budget(extensions, int(budget * factors * 4 / dtype.itemsize) - held)

    def stored(x: BasisExtension) -> BasisExtension:
        tensors = {name: getattr(x, name) for name in ("columns", "beyond", "outputs")}
        kept = {name: tensor.to("cpu", dtype) for name, tensor in tensors.items() if tensor is not None}
        return dataclasses.replace(x, **kept)

    return {name: stored(x) for name, x in extensions.items()}


def warn_of_caps(task: str, extensions: dict[str, BasisExtension], budget: float | None) -> None:
    """Logs which bases hold less of a task than was asked for."""
    capped = {name: extension.captured for name, extension in extensions.items() if extension.capped}
    if not capped:
        return
    name, captured = min(capped.items(), key=lambda item: item[1])
    more = "" if budget is None else f" A `basis_budget` above {budget:g} lets a task add more columns."
    logger.warning(
        f"Task {task!r}: the bases of {len(capped)} of {len(extensions)} layers reached their cap and hold less than "
        f"the energy asked for, the worst {captured:.1%} ({name}).{more} If the layers have little room left, a "
        "smaller LoRA rank, `energy_threshold` or `max_basis_fraction` leaves more to later tasks; if their sums were "
        "sketched, `snapshot_offload=True` keeps them whole."
    )


def captured_by(extensions: dict[str, BasisExtension]) -> dict[str, Any]:
    """For the record of a task: what share of the energy its bases hold, and how many columns it has added."""
    held = {name: min(max(x.captured, 0.0), 1.0) for name, x in extensions.items()}  # sums are off by rounding
    return {
        "captured": sum(held.values()) / len(held),
        "captured_least": min(held.values()),
        "columns": sum(extension.columns.shape[1] for extension in extensions.values()),
        "layers_capped": sum(extension.capped for extension in extensions.values()),
        "layers": len(held),
    }


def training_record(
    task: Task,
    config: EBLoRAConfig,
    args: TrainingArguments,
    optimizer: torch.optim.Optimizer,
    constraint: StepHooks | None,
) -> dict[str, Any]:
    """How a task was trained: what differs from the defaults, the rates in use, the seed and the library versions."""
    defaults, overrides = (
        EBLoRAConfig(),
        ("num_train_epochs", "max_steps", "learning_rate", "direction_lr", "scale_lr", "head_learning_rate"),
    )
    changed = {key: value for key, value in vars(config).items() if value != getattr(defaults, key)}
    packages = ("transformers", "peft", "accelerate", "torch")
    group = optimizer.param_groups[0]
    return {
        "eblora_config": {"method": config.method} | changed,
        "task": {key: as_plain(getattr(task, key)) for key in overrides if getattr(task, key) is not None},
        "rates": constraint.rates if constraint else {},
        "learning_rate": float(group.get("initial_lr", group["lr"])),
        "optim": str(getattr(args.optim, "value", args.optim)),
        "seed": args.seed,
        "versions": {
            "python": platform.python_version(),
            "eblora-hf": __version__,
            **{name: version(name) for name in packages},
        },
    }
