"""`ContinualEBLoRATrainer`: `transformers.Trainer` that learns tasks one after another and forgets less."""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..adapters.earlier_tasks import EarlierTasks
from ..adapters.layers import find_layers, keep_differentiable
from ..config import EBLoRAConfig, Task
from ..manifold.maps import multiplies_exactly
from ..methods.build import build_method
from ..metrics import continual_metrics
from ..published.hub import check_beginning, fetch_sequence
from ..published.identity import describe_base_model
from ..published.sequence import PublishedSequence
from .arguments import check_layers, check_set_up, read_tasks, with_adapter
from .callback import TaskSequenceCallback
from .constrained import last_complete_checkpoint
from .one_task import OneTaskMixin
from .processes import broadcast_model
from .publisher import Publisher

logger = logging.get_logger(__name__)


class ContinualMixin(OneTaskMixin):
    """
    Drives a sequence of tasks through a `Trainer`; it goes first: `class MyTrainer(ContinualMixin, Trainer)`.

    All arguments of the trainer keep their names, order and meaning, but for:

    Args:
        train_dataset (dataset, `dict[str, dataset]` or [`TaskSequence`]): One task, or several to learn in order.
        eval_dataset (dataset or `dict[str, dataset]`, *optional*): In a dict, the set under a task's name is used
            while that task trains. After each task all are evaluated; those under task names fill the accuracy matrix.
        peft_config (`peft.LoraConfig`, *optional*): The adapter to add to a model that has none.
        eblora_config ([`EBLoRAConfig`], *optional*): Options of the method.
        sequence (`str` or `Path`, *optional*): A published sequence to continue: a folder, or on the Hub `"user/repo"`
            or `"user/repo@revision"`. New tasks are appended in `args.output_dir`, which may be the same folder.
        task_name (`str`, *optional*): Name of the task when `train_dataset` is one data set; "task" by default.
        push_bases (`bool` or `str`, *optional*): Where the bases go when the sequence is pushed: into its repository
            (`True`), nowhere (`False`), or into another, private one. They can leak training data. By default as the
            sequence on the Hub has it, and `True` for a new one.

    Attributes:
        source (`str` or `Path`, *optional*): The published sequence that is continued.
        task_callback ([`TaskSequenceCallback`]): The bases and the published sequence, once `train` has begun.
        constraint ([`StepHooks`], *optional*): What the method does around the optimizer's steps while a task trains.

    Raises:
        ValueError: if the model has no LoRA adapter and no `peft_config` was given, if an argument does not fit, or if
            the set-up (DeepSpeed, FSDP1…) is not supported; the message says what to do.
    """

    def __init__(
        self,
        *args,
        peft_config: LoraConfig | None = None,
        eblora_config: EBLoRAConfig | None = None,
        sequence: str | Path | None = None,
        task_name: str | None = None,
        push_bases: bool | str | None = None,
        **kwargs,
    ):
        arguments = self._by_name(args, kwargs)
        peft_config = arguments.pop("peft_config", peft_config)  # SFTTrainer takes it by position as well
        if eblora_config is not None and not isinstance(eblora_config, EBLoRAConfig):
            raise ValueError(f"`eblora_config` must be an EBLoRAConfig, got {eblora_config!r}.")
        self.eblora_config = eblora_config or EBLoRAConfig()
        self.method = build_method(self.eblora_config)
        check_set_up(arguments, self.method.constrained)
        given = arguments.get("model")
        model = arguments["model"] = with_adapter(given, peft_config)
        try:
            self.adapter = model.active_adapters[0]
            self.layers = find_layers(model, self.adapter)
            keep_differentiable(model)
            check_layers(self.layers, self.adapter, self.method.orthonormal or not self.method.trains_lora_A)
            self.tasks = read_tasks(arguments, task_name)
            if arguments.get("args") is None:
                arguments["args"] = TrainingArguments()
            self.publisher = Publisher(arguments["args"], push_bases)
            # the parent would push checkpoints, optimizers and `training_args.bin`; we push the sequence
            arguments["args"] = copy.copy(arguments["args"])
            arguments["args"].push_to_hub = False
            super().__init__(**arguments)
            self.check_sharding()
        except Exception:
            if model is not given:
                model.unload()  # the user's model as it was, for the next try
                vars(given).pop("peft_config", None)
            raise
        self.source = sequence
        # autocast and TF32 would round away most of a small update on top of weights that were once in bf16
        exact = self.accelerator.mixed_precision == "no" and multiplies_exactly() and not self.is_fsdp_enabled
        merge = exact and self.method.merges_earlier_tasks and self.eblora_config.snapshot_at != "pretrained"
        self.earlier_tasks = EarlierTasks(merge, self.eblora_config.earlier_tasks_error)
        self._given_optimizer = self.optimizer
        self.start_from({})
        head = getattr(model.peft_config[self.adapter], "modules_to_save", None)
        if head and self.method.remembers:
            logger.warning(
                f"The modules {', '.join(head)} are trained without the subspace constraint (LoRA alone is "
                "protected): later tasks may change them at the expense of earlier ones."
            )

    def _by_name(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by the names of the next constructor that spells them out."""
        following = type(self).__mro__[type(self).__mro__.index(ContinualMixin) + 1 :]
        for cls in following:
            names = inspect.signature(cls.__init__).parameters if "__init__" in vars(cls) else {}
            if names and not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in names.values()):
                named = dict(zip(list(names)[1:], args, strict=False))
                twice = named.keys() & kwargs.keys()
                if len(args) >= len(names) or twice:
                    raise TypeError(f"{type(self).__name__} got too many arguments, or twice: {', '.join(twice)}.")
                return named | kwargs
        raise TypeError(f"{type(self).__name__} has no trainer class after ContinualMixin.")

    # ---- the sequence ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Learns the tasks that the published sequence in `args.output_dir` does not have yet, one after another.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): `True` skips the finished tasks and continues the
                unfinished one from its last checkpoint; a path names that checkpoint.
            trial, ignore_keys_for_eval: As in `Trainer.train`.

        Returns:
            `TrainOutput`: Steps and mean loss over the tasks of this call; the metrics of the last task, and those of
            the accuracy matrix if there is one.

        Raises:
            ValueError: if `args.output_dir` already holds a sequence and this call is not meant to continue it.
        """
        if self.tasks is None:
            raise ValueError("Training needs a train_dataset, got none.")
        with _flushed_denormals(self.args.device):
            try:
                return self._learn_all(resume_from_checkpoint, trial, ignore_keys_for_eval)
            finally:
                self.earlier_tasks.leave(self.model)

    def _learn_all(self, resume: str | bool | None, trial: Any, ignore_keys: list[str] | None) -> TrainOutput:
        if not self.is_fsdp_enabled:
            broadcast_model(self.model)  # before the first snapshot, which comes before accelerate does it
        published = self._open_sequence(resuming=bool(resume))
        self.remove_callback(TaskSequenceCallback)
        keeps_bases, dtype = self.method.remembers is not None, getattr(torch, self.eblora_config.basis_dtype)
        self.task_callback = TaskSequenceCallback(published, keeps_bases, dtype)
        self.add_callback(self.task_callback)
        if self.args.should_save:
            self.publisher.prepare(published)  # a bad token or a conflict shows before hours of training
        pending = [task for task in self.tasks if task.name not in published.names]
        outputs, history = [], []
        for task in pending:
            checkpoint = self._checkpoint_of(task, resume if task is pending[0] else None)
            outputs.append(self._learn(task, checkpoint, trial, ignore_keys))
            history += self.state.log_history
        self.state.log_history = history
        self._become_sum_of_tasks()
        if self.args.should_save:
            self.publisher.finish(published)
        steps = sum(output.global_step for output in outputs)
        loss = sum(output.training_loss * output.global_step for output in outputs) / max(steps, 1)
        metrics = dict(outputs[-1].metrics) if outputs else {}
        metrics |= {f"train_{name}": value for name, value in self.continual_metrics().items() if not np.isnan(value)}
        return TrainOutput(steps, loss, metrics)

    @property
    def bases(self) -> dict[str, torch.Tensor]:
        """Per layer name the orthonormal basis `(d_in, p)` of the tasks learnt so far."""
        return {} if self.task_callback is None else self.task_callback.bases

    @property
    def accuracy_matrix(self) -> np.ndarray:
        """R[t][i], the accuracy on task i after learning task t; NaN where it was not measured."""
        return np.zeros((0, 0)) if self.task_callback is None else self.task_callback.accuracy_matrix()

    def continual_metrics(self) -> dict[str, float]:
        """MFN, MAA, LA, BWT, FWT and transfer of the accuracy matrix; empty before the first task is finished."""
        matrix = self.accuracy_matrix
        return continual_metrics(matrix) if matrix.size else {}

    def _open_sequence(self, resuming: bool) -> PublishedSequence:
        folder = Path(self.args.output_dir)
        base = self.model.get_base_model()
        heads = getattr(self.model.peft_config[self.adapter], "modules_to_save", None) or []
        exists = PublishedSequence.exists(folder)
        self.accelerator.wait_for_everyone()  # all have looked before one of them writes
        if exists:
            if not resuming and (self.source is None or Path(self.source).resolve() != folder.resolve()):
                raise ValueError(
                    f"{folder} already holds a sequence of tasks. Pass `train(resume_from_checkpoint=True)` to "
                    f"continue an interrupted run, `sequence={str(folder)!r}` to append new tasks, or another "
                    "`output_dir`."
                )
            if self.is_world_process_zero():
                own = PublishedSequence.open(folder, repair=True)
                if self.source is not None and Path(self.source).resolve() != folder.resolve():
                    check_beginning(fetch_sequence(self.source, token=self.args.hub_token).tasks, own, self.source)
        elif self.source is not None:
            if self.is_world_process_zero():
                fetch_sequence(self.source, token=self.args.hub_token, folder=folder)
        else:
            published = PublishedSequence(folder, describe_base_model(base, heads))
            published.check_strays(self.tasks.names[0])
            return published
        self.accelerator.wait_for_everyone()
        published = PublishedSequence.open(folder)
        published.check_base_model(base)
        published.check_layers([layer.name for layer in self.layers])
        pending = [name for name in self.tasks.names if name not in published.names]
        published.check_strays((pending or self.tasks.names)[0])
        taken = set(self.tasks.names) & set(published.names)
        if taken and not resuming:
            raise ValueError(
                f"The sequence in {folder} already has the task(s) {', '.join(sorted(taken))}: give new tasks new "
                "names (`task_name=…` or the keys of `train_dataset`)."
            )
        without = published.names_without_basis()
        if self.method.remembers and without:
            raise ValueError(
                f"The task(s) {', '.join(without)} in {folder} were learnt by a method that keeps no basis, so that "
                f"{self.eblora_config.method!r} cannot protect them. Continue with that method, or start a new "
                "sequence."
            )
        return published

    def _checkpoint_of(self, task: Task, resume: str | bool | None) -> str | None:
        folder = self._checkpoint_folder(task)
        if isinstance(resume, (str, Path)):
            if Path(resume).resolve().parent != folder.resolve():
                raise ValueError(
                    f"{resume} is not a checkpoint of the task {task.name!r}, which comes next: expected one in "
                    f"{folder}. Pass `resume_from_checkpoint=True` for its newest."
                )
            return str(resume)
        checkpoint = last_complete_checkpoint(folder)
        if resume and checkpoint is None and not self.task_callback.sequence.tasks and not folder.is_dir():
            raise ValueError(
                f"Nothing to resume: no finished task in {self.args.output_dir} and no checkpoint in {folder}. Call "
                "train() without `resume_from_checkpoint`."
            )
        if checkpoint is not None and not resume:
            raise ValueError(
                f"{folder} holds checkpoints of an earlier run. Pass `train(resume_from_checkpoint=True)` to "
                "continue it, or delete the folder to start the task again."
            )
        return checkpoint


@contextlib.contextmanager
def _flushed_denormals(device: torch.device) -> Iterator[None]:
    """
    On a CPU, rounds denormal numbers to zero: moments of directions that are projected out decay into them, and they
    slow it several times.
    """
    already = (torch.tensor(1e-38) * 0.1).item() == 0.0
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(already)


class ContinualEBLoRATrainer(ContinualMixin, Trainer):
    """
    `transformers.Trainer` that learns tasks one after another with EBLoRA and publishes plain LoRA adapters.

    Takes the arguments of `Trainer`, and those of [`ContinualMixin`] by keyword.

    Example:

    ```python
    from peft import LoraConfig
    from eblora_hf import ContinualEBLoRATrainer

    trainer = ContinualEBLoRATrainer(
        model=model,
        args=TrainingArguments("out"),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
        train_dataset={"imagenet-r": train_1, "arxivqa": train_2},
        eval_dataset={"imagenet-r": eval_1, "arxivqa": eval_2},
        compute_metrics=compute_metrics,
    )
    trainer.train()
    ```
    """
