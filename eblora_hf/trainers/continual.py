"""`ContinualMixin`: what drives a sequence of tasks through a `Trainer`."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy, TrainOutput
from transformers.utils import logging

from ..adapters.composition import concatenate, folded_adapter, replace_adapter
from ..adapters.earlier_tasks import EarlierTasks
from ..adapters.factors import Factors
from ..adapters.layers import find_layers, keep_differentiable
from ..adapters.leftovers import begin_run, end_run, unwrapped
from ..adapters.switches import free_switches, hold_switches
from ..config import EBLoRAConfig
from ..manifold.maps import flushed_denormals, multiplies_exactly
from ..methods.base import Snapshots
from ..methods.build import build_method
from ..published.locks import one_writer
from ..published.schema import as_word
from ..tasks import Task, TaskSequence
from .anchoring import check_anchor
from .arguments import by_name, check_frozen, check_layers, check_set_up, holds_tasks, read_tasks, with_adapter
from .beginning import BeginningMixin
from .callback import training_record
from .checkpoints import checkpoint_to_resume
from .companions import name_base_model
from .evaluation import Measured
from .heads import TaskHeads
from .one_task import as_task, draw_lora_A, joined_output, put_fresh_adapter
from .opening import config_to_continue
from .processes import broadcast_model, check_same_everywhere, spread_over_processes, together
from .publisher import Publisher, PublishingMixin
from .signals import StopRequestedError, listen_again, stops_on_sigterm

logger = logging.get_logger(__name__)


class ContinualMixin(PublishingMixin, BeginningMixin):
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
            or `"user/repo@revision"`. New tasks are appended in `args.output_dir`, which may be the same folder. Or
            any plain LoRA adapter, which becomes the first task of a new sequence in `args.output_dir`. Without a
            `peft_config` the new tasks adapt the same layers with the same ranks.
        task_name (`str`, *optional*): Name of the task when `train_dataset` is one data set; "task" by default.
        push_bases (`bool` or `str`, *optional*): Where bases, which can leak training data, are pushed: with the
            sequence (`True`), nowhere (`False`), or into a private repository. By default as before, at first `True`.
        protect_data (dataset, *optional*): A sample of what a plain LoRA adapter as `sequence` was trained on, for its
            basis. By default that is of the adapter itself.
        anchor (dataset or `"random"`, *optional*): A few dozen rows like those of the pre-training, without labels, to
            which every step holds the answers (`EBLoRAConfig.anchor_weight`); or inputs that are drawn instead.

    Attributes:
        source (`str` or `Path`, *optional*): The published sequence that is continued.
        task_callback ([`TaskSequenceCallback`]): The bases and the published sequence, once `train` has begun.
        constraint ([`StepHooks`], *optional*): What the method does around the optimizer's steps while a task trains.

    Raises:
        ValueError: if there is neither a LoRA adapter nor a `peft_config`, or if an argument or the set-up (DeepSpeed,
            FSDP1…) is not supported; the message says what to do.
    """

    def __init__(
        self,
        *args,
        peft_config: LoraConfig | None = None,
        eblora_config: EBLoRAConfig | None = None,
        sequence: str | Path | None = None,
        task_name: str | None = None,
        push_bases: bool | str | None = None,
        protect_data: Any = None,
        anchor: Any = None,
        **kwargs,
    ):
        arguments = by_name(type(self), ContinualMixin, args, kwargs)
        peft_config = arguments.pop("peft_config", peft_config)  # SFTTrainer takes it by position as well
        if eblora_config is not None and not isinstance(eblora_config, EBLoRAConfig):
            raise ValueError(f"`eblora_config` must be an EBLoRAConfig, got {eblora_config!r}.")
        self.eblora_config = eblora_config or EBLoRAConfig()
        self.method = build_method(self.eblora_config)
        check_set_up(arguments, self.eblora_config, self.method.constrained, continues=sequence is not None)
        check_anchor(anchor, arguments.get("args"))
        given = arguments.get("model")
        if sequence is not None and peft_config is None and not isinstance(given, PeftModel):
            peft_config = config_to_continue(sequence, arguments.get("args"))
        flags = [(p, p.requires_grad) for p in given.parameters()] if isinstance(given, torch.nn.Module) else []
        model = arguments["model"] = with_adapter(given, peft_config, own_heads=self.eblora_config.heads != "shared")
        try:
            self.adapter = model.active_adapters[0]
            self.layers = find_layers(model, self.adapter)
            keep_differentiable(model)
            check_frozen(model)
            check_layers(self.layers, self.adapter, self.method.orthonormal or not self.method.trains_lora_A)
            self.skips_learnt = holds_tasks(arguments.get("train_dataset"))
            self.tasks = read_tasks(arguments, task_name)
            self.heads = TaskHeads(model, self.adapter, self.eblora_config.heads, self.tasks)
            self._seen, adapters = arguments.get("train_dataset"), set(model.peft_config)
            if arguments.get("args") is None:
                arguments["args"] = TrainingArguments()
            self.publisher = Publisher(arguments["args"], push_bases)
            # the parent would push checkpoints, optimizers and `training_args.bin`; we push the sequence
            arguments["args"] = copy.copy(arguments["args"])
            arguments["args"].push_to_hub = False
            super().__init__(**arguments)
            for copied in set(model.peft_config) - adapters:  # TRL's reference, which `disable_adapter` is here
                model.delete_adapter(copied)
            self.tasks = self.tasks and self.prepared(self.tasks)
            self.prepare_anchor(anchor)
            self.check_replay()
            self.check_head_rate()
            self.check_sharding()
        except Exception:
            if model is not given:
                unwrapped(model.unload())  # the user's model as it was, for the next try
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)
            raise
        self.source, self.protect_data = sequence, protect_data
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
        self._outputs: list[TrainOutput] = []
        with flushed_denormals(self.args.device), stops_on_sigterm(self.callback_handler):
            try:
                begin_run(self.model, self.adapter)
                self.begun_task = False
                self._learn_all(self.tasks, resume_from_checkpoint, trial, ignore_keys_for_eval)
            except StopRequestedError:
                logger.warning("SIGTERM: stopped between two trainings. `train(resume_from_checkpoint=True)` goes on.")
            finally:
                self.begun_task = False
                free_switches(self.model)
                self.earlier_tasks.leave(self.model)
        return joined_output(self._outputs, self.continual_metrics())

    def _learn_all(self, tasks: TaskSequence, resume: str | bool | None, trial: Any, ignore_keys: Any) -> None:
        if not self.is_fsdp_enabled:
            broadcast_model(self.model)  # before the first snapshot, which comes before accelerate does it
        self.begin_sequence(tasks.names, resuming=bool(resume))
        published = self.begun.sequence
        with together("looking at the Hub"):
            self.publisher.prepare(published)  # a bad token or a conflict shows before hours of training
        pending = [task for task in tasks if task.name not in published.names]
        history = []
        with one_writer(published.folder, "run", writes=self.args.should_save):
            if self.args.should_save:
                name_base_model(published.folder, self.model.get_base_model())
            for task in pending:
                folder, resumed = self._checkpoint_folder(task), resume if task is pending[0] else None
                checkpoint = checkpoint_to_resume(folder, task.name, resumed, is_first=not published.tasks)
                self._outputs.append(self._learn_task(task, checkpoint, trial, ignore_keys))
                history += self.state.log_history
                if not self.is_trained:
                    break
        self.state.log_history = history
        if pending and not self.is_trained:
            logger.warning(
                f"Training was stopped at step {self.state.global_step} of {self.state.max_steps} of {task.name!r}, "
                "which is kept and not published. `train(resume_from_checkpoint=True)` goes on from there."
            )
            return
        self._become_sum_of_tasks()
        end_run(self.model)
        with together("pushing"):
            self.publisher.finish(published)

    # ---- one task ----

    def _learn_task(
        self, task: Task, checkpoint: str | None, trial: Any, ignore_keys: list[str] | None
    ) -> TrainOutput:
        """Learns one task: the events of docs/architecture.md in their order, up to a stop in mid-training."""
        seed = self.args.seed + len(self.begun.sequence.tasks)
        self._renew_adapter(task, seed)
        self.begin_anchor(task, seed)
        self._start_task(task, seed, checkpoint)
        output = self._train_task(task, seed, checkpoint, trial, ignore_keys)
        if not self.is_trained:
            return output
        trained = self._leave_training(task)
        self._keep_task(task, seed, trained, self.measure(task))
        self.publish_task()
        self.heads.go_on_from(self.begun.sequence)
        return output

    def _renew_adapter(self, task: Task, seed: int) -> None:
        """A fresh adapter beside the earlier tasks, and a trainer that remembers nothing of the task before."""
        published = self.begun.sequence
        logger.info(f"***** Task {len(published.tasks)}: {task.name} *****")
        if self.args.should_save:
            self._checkpoint_folder(task).mkdir(parents=True, exist_ok=True)  # from here on there is a run to resume
        self.unwrap()
        self.shard()
        self.layers, earlier = put_fresh_adapter(
            self.model, self.adapter, self.earlier_tasks, published.adapters(), self.method
        )
        self._earlier_record = {"earlier_tasks": earlier} if earlier else {}
        self.heads.put(task.name, published, seed)
        hold_switches(self.model, self.adapter)
        self.begun_task = True
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

    def _start_task(self, task: Task, seed: int, checkpoint: str | None) -> None:
        """What the method starts the task from: a snapshot of its data at the current weights, or a checkpoint."""
        set_seed(seed)
        if checkpoint is None:
            with as_task(self, task, self._checkpoint_folder(task)):
                self.plan_training()
            set_seed(seed)
            draw_lora_A(self.layers)
            start = self._decompose(self.method.begin_task, self.snapshot_of_start(task.train_dataset, seed))
            self.start_from(start)
            self.forget_plan()
        else:
            with as_task(self, task, self._checkpoint_folder(task)):
                self.resume_from(checkpoint)
        check_same_everywhere(self.start_tensors())
        self.begun.begin_task(task.name)

    def _train_task(self, task: Task, seed: int, checkpoint: str | None, trial: Any, ignore_keys: Any) -> TrainOutput:
        """The loop of the trainer's parent, with the arguments of the task."""
        set_seed(seed)
        with as_task(self, task, self._checkpoint_folder(task)):
            listen_again(self.callback_handler)
            output = super().train(checkpoint, trial, ignore_keys)
            self.save_end()
        return output

    def _leave_training(self, task: Task) -> tuple[dict[str, Factors], dict[str, Any]]:
        """What training leaves beside the adapter: the factors of a constraint, and how the task was trained."""
        record = training_record(task, self.eblora_config, self.args, self.optimizer, self.constraint)
        self.check_finite(task.name)
        self.method.finish_training(self.layers)
        record |= self.anchor_record() | self._earlier_record
        return self.constraint.factors() if self.constraint is not None else {}, record

    def _keep_task(self, task: Task, seed: int, trained: tuple[dict, dict], measured: Measured) -> None:
        """Extends the bases by what was observed at the trained weights, and appends the task to the sequence."""
        factors, record = trained
        if measured.metric is not None:
            record["metric"] = as_word(measured.metric)
        self.unwrap()
        extensions = self._decompose(  # which holds what was observed no longer than it needs it
            self.method.end_task, self.observed() or self.snapshot(task.train_dataset, seed, self.method.remembers)
        )
        adapter = folded_adapter(self.model, self.layers, factors)
        columns = {f"the basis of {name}": extension.columns for name, extension in extensions.items()}
        check_same_everywhere(adapter | columns)
        with together("writing the task"):
            self.keep_rows(task, seed)
            self.begun.end_task(
                adapter,
                self.model.peft_config[self.adapter],
                extensions if self.method.remembers else None,
                steps=self.state.global_step,
                metrics=measured.row,
                root_metrics=measured.root_row,
                labels=self.heads.labels.get(task.name),
                training=record,
                write=self.args.should_save,
            )
            self.write_companions()
        if self.args.save_strategy == SaveStrategy.NO and self.args.should_save:
            shutil.rmtree(self._checkpoint_folder(task), ignore_errors=True)  # it was kept for the case of a failure

    # ---- parts of these events ----

    def _checkpoint_folder(self, task: Task) -> Path:
        return Path(self.args.output_dir) / "checkpoints" / task.name

    def _decompose(self, answer: Callable, snapshot: Snapshots) -> dict[str, Any]:
        """What the method answers of a snapshot of the task."""
        return spread_over_processes(lambda share: answer(share, snapshot, self.bases), self.layers)

    def _become_sum_of_tasks(self) -> None:
        """
        Leaves one adapter on the model, the sum of all tasks, so that whatever is saved next is all that was learnt.
        A sharded model keeps two, the last task's and the earlier ones': FSDP2 would not know of a new adapter.
        """
        published = self.begun.sequence
        self.unwrap()
        self.earlier_tasks.restore()
        is_there = len(published.tasks) == 1 and len(self._outputs) == 1  # the only task was learnt just now
        if not is_there and not self.is_fsdp_enabled:
            replace_adapter(self.model, self.adapter, concatenate(published.adapters()))
            self.layers = find_layers(self.model, self.adapter)
        self.heads.name_newest()
        self.optimizer, self.lr_scheduler = None, None
