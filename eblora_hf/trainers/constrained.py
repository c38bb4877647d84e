"""The part of a `Trainer` that one task needs: gradient snapshots, a constrained optimizer, complete checkpoints."""

from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..adapters.composition import EARLIER_TASKS, activate, adapter_state
from ..adapters.factors import load_state, save_state
from ..adapters.heads import trained_heads
from ..adapters.sharding import whole
from ..adapters.switches import acts, is_switched_by_us, switch_back
from ..manifold.optimizers import plain_optimizer, set_learning_rate
from ..published.checks import check_finite
from .anchoring import AnchoringMixin
from .checkpoints import check_checkpoint, is_trained, last_complete_checkpoint, write_method, write_trained
from .fsdp import ShardedMixin

logger = logging.get_logger(__name__)

_NEVER = 2**62  # a step that no training reaches


class ConstrainedMixin(AnchoringMixin, ShardedMixin):
    """
    Overrides what a `Trainer` calls while it trains, so that the steps of its optimizer are what the method
    allows.
    """

    def start_from(self, start: dict[str, Any]) -> None:
        """Sets what the method's constraint of the next training starts from, and lets go of the one before."""
        if self.constraint is not None:
            self.constraint.detach()
        self.constraint, self._start = None, start
        self._state: dict[str, torch.Tensor] | None = None
        self.resumes_trained = False
        self.forget_observation()
        self._bad_step: torch.Tensor | None = None

    def start_tensors(self) -> dict[str, torch.Tensor]:
        """What the task starts from: its adapter, and what the constraint is given."""
        tensors = {key: whole(value) for key, value in adapter_state(self.model, self.adapter).items()}
        for name, start in self._start.items():
            tensors |= {f"{key} of {name}": x for key, x in vars(start).items() if isinstance(x, torch.Tensor)}
        return tensors

    def set_trainable(self) -> None:
        """Sets which parameters of the adapter are trained."""
        for layer in self.layers:  # whatever activated the adapter made all of it trainable
            layer.lora_A.requires_grad_(self.method.trains_lora_A)
        self.heads.set_trainable()

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Builds the optimizer that the arguments ask for, and refuses one that cannot be kept on the manifold."""
        self.set_trainable()
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.method.constrained:
            plain_optimizer(optimizer)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for layer in self.layers:
            if id(layer.lora_B) not in held:
                raise ValueError(
                    f"The optimizer does not hold lora_B of {layer.name}, so it would not train. One made before the "
                    f"trainer does not know the parameters that the method {self.eblora_config.method!r} trains: pass "
                    "`optimizer_cls_and_kwargs` instead of `optimizers`."
                )
        for name, parameter in trained_heads(self.model).items():
            if id(parameter) not in held:
                raise ValueError(
                    f"The optimizer does not hold {name}, so it would not train: a task's head is made when the task "
                    "begins. Pass `optimizer_cls_and_kwargs` instead of `optimizers`."
                )
        self.heads.hold(optimizer)
        if self.eblora_config.head_learning_rate is not None:
            set_learning_rate(optimizer, trained_heads(self.model).values(), self.eblora_config.head_learning_rate)
        self.note_groups(optimizer)
        return optimizer

    def check_head_rate(self) -> None:
        """Raises a `ValueError` if the heads cannot have a learning rate of their own."""
        rates = {"EBLoRAConfig": self.eblora_config.head_learning_rate}
        rates |= {f"Task({task.name!r})": task.head_learning_rate for task in self.tasks or ()}
        for where, rate in rates.items():
            if rate is not None and not self.heads.declared:
                raise ValueError(
                    f"head_learning_rate={rate!r} of {where}: the model has no trained head. Leave it out, or name a "
                    "head in LoraConfig(modules_to_save=[…])."
                )
            if rate is not None and self.lr_scheduler is not None:
                raise ValueError(
                    f"head_learning_rate={rate!r} of {where}, with a scheduler of your own in `optimizers`: it was "
                    "made for the groups that the optimizer has. Give the head its rate there, or pass the optimizer "
                    "alone."
                )

    def create_scheduler(self, num_training_steps: int, *args, **kwargs) -> torch.optim.lr_scheduler.LRScheduler:
        """
        Builds the scheduler, and attaches the constraint now that the optimizer and the number of steps are known.
        """
        if num_training_steps < 1:
            raise ValueError(
                f"There is no training step to take (num_train_epochs={self.args.num_train_epochs}, "
                f"max_steps={self.args.max_steps}): a task that learns nothing is not published."
            )
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if self.method.constrained:
            if self.constraint is not None:  # a second attempt with a smaller batch (`auto_find_batch_size`)
                self.constraint.detach()
            self.method.anchored, self.method.curvatures = self.anchored, self.begun.curvatures
            constraint = self.method.constrain(
                self.optimizer, self.layers, self._start, self.bases, num_training_steps
            )
            if constraint is not None and self._state is not None:
                constraint.load_state_dict(self._state)
            self.constraint = constraint
        return scheduler

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """
        One forward and backward pass; never without the constraint that the method needs.

        The gradients that clipping and the logged `grad_norm` see are those of lora_A and lora_B, as in plain LoRA.
        A constraint changes them inside `optimizer.step`, where they are known to be synchronised, unscaled and
        clipped.
        """
        if self.method.constrained and self.constraint is None:
            raise RuntimeError(
                "Training would run without its constraint: `create_scheduler` of ContinualMixin was not called. Call "
                "super() in your override, and put ContinualMixin first among the base classes."
            )
        self.keep_switched()
        with self.heads.learning():
            loss = super().training_step(*args, **kwargs)
        # kept on the device: asking for it at every step would wait for it
        bad_step = torch.where(torch.isfinite(loss.detach()), _NEVER, self.state.global_step + 1)
        self._bad_step = bad_step if self._bad_step is None else torch.minimum(self._bad_step, bad_step)
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        if not is_switched_by_us(self.model):  # what is measured within such a context is its model
            self.keep_switched()
        return super().prediction_step(*args, **kwargs)

    def keep_switched(self) -> None:
        """Undoes what a callback has switched: the adapter that is trained acts, and earlier tasks beside it."""
        if self.begun_task and not acts(self.model, self.layers):
            logger.warning(
                f"The adapter {self.adapter!r} or the earlier tasks were switched off, or earlier tasks set to be "
                "trained, by `set_adapter`, `disable_adapter_layers` or the like. They are on again. Use `with "
                "model.disable_adapter():` for the model before the task, and `with trainer.pretrained_model():` for "
                "the one before all tasks."
            )
            switch_back(self.model, self.adapter)
            self.set_trainable()

    def check_finite(self, task: str) -> None:
        """Raises a `ValueError` if training has diverged; it names the first bad step that this process has seen."""
        step = _NEVER if self._bad_step is None else int(self._bad_step)
        held = {key: whole(value) for key, value in adapter_state(self.model, self.adapter).items()}
        check_finite(task, held, None if step == _NEVER else step)

    def get_batch_samples(self, *args, **kwargs) -> Any:
        """The batches of a step; none after the last one, where the parent would resume in mid-epoch with another."""
        if self.is_trained:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    @property
    def is_trained(self) -> bool:
        """Whether the training of the task has ended: its steps are done, or early stopping has ended it."""
        stopped_early = any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )
        return self.resumes_trained or stopped_early or self.state.global_step >= self.state.max_steps

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """No weight decay on orthonormal factors, whose norm is fixed."""
        names = super().get_decay_parameter_names(model)
        if not self.method.orthonormal:
            return names
        return [name for name in names if ".lora_A." not in name and ".lora_B." not in name]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # earlier tasks lie in the sequence already; inside a checkpoint they would be loaded as a further adapter
        earlier = self.model.peft_config.pop(EARLIER_TASKS, None)
        try:
            super()._save(output_dir, state_dict)
        finally:
            if earlier is not None:
                self.model.peft_config[EARLIER_TASKS] = earlier
        if self.constraint is not None and self.is_in_train and self.args.should_save:
            save_state(self.constraint.state_dict(), output_dir or self.args.output_dir)
        if self.is_in_train and self.args.should_save:
            write_method(output_dir or self.args.output_dir, self._trains_with)

    @property
    def _trains_with(self) -> str:
        """What a checkpoint has to have been trained with: the groups of its optimizer depend on it."""
        rate = self.eblora_config.head_learning_rate
        return self.eblora_config.method + ("" if rate is None else f" with head_learning_rate={rate!r}")

    def save_end(self) -> None:
        """
        Keeps where training has ended, on all processes at once: whatever fails from here on, resuming redoes only
        that.
        """
        folder, step = Path(self.args.output_dir), self.state.global_step
        last = last_complete_checkpoint(folder)
        self.accelerator.wait_for_everyone()  # all have looked before one of them writes
        if last is None or Path(last).name != f"{PREFIX_CHECKPOINT_DIR}-{step}":
            self.is_in_train = True
            self._save_checkpoint(self.model, trial=None)
            self.is_in_train = False
        if self.is_trained and self.args.should_save:
            write_trained(folder / f"{PREFIX_CHECKPOINT_DIR}-{step}", step)

    def resume_from(self, checkpoint: str) -> None:
        """
        Sets what the constraint of the next training goes on from, which the parent resumes from the same checkpoint.

        Raises:
            FileNotFoundError: if a file of the checkpoint is missing; the message names it.
            ValueError: if the checkpoint is of another method, or damaged.
        """
        check_checkpoint(
            checkpoint,
            self._trains_with,
            with_optimizer=not self.args.save_only_model,
            sharded=self.is_fsdp_enabled,
        )
        if self.method.constrained:
            state = load_state(checkpoint)
            self.start_from(self.method.resume(self.layers, state))
            self._state = state
        self.load_observation(checkpoint)
        self.resumes_trained = is_trained(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        activate(self.model, self.adapter)  # the parent leaves one adapter active

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.adapter != "default" and not self.is_fsdp_enabled:
            # PEFT saves it in a sub-folder, where the parent does not look
            self.model.load_adapter(str(Path(str(self.state.best_model_checkpoint)) / self.adapter), self.adapter)
        activate(self.model, self.adapter)
        if self.constraint is not None:
            self.constraint.load_state_dict(load_state(str(self.state.best_model_checkpoint)))
