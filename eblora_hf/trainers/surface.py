"""The trainer as its mixins see it: what a built `Trainer` has, and what of ours lies on the same `self`."""

from typing import TYPE_CHECKING, Any

import torch

from ..adapters.layers import AdaptedLayer
from ..config import EBLoRAConfig
from ..manifold.step_hooks import StepHooks
from ..methods.base import Method
from ..tasks import TaskSequence
from .callback import TaskSequenceCallback
from .heads import TaskHeads

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # a mixin is laid over one; it is none itself


class TrainerSurface(Trainer):
    """
    Declares the attributes that the mixins share. It overrides nothing and does nothing.

    Attributes:
        model (`PeftModel`): The model, with the adapter that is trained.
        args (`TrainingArguments`): The arguments, whose fields are set once they are built.
        eblora_config ([`EBLoRAConfig`]): The options.
        heads ([`TaskHeads`]): The head of every task.
        method ([`Method`]): What constrains the steps, if anything.
        adapter (`str`): Name of the adapter that is trained.
        layers (`list[AdaptedLayer]`): The layers whose adapter is trained.
        tasks ([`TaskSequence`], *optional*): The tasks of this run.
        constraint ([`StepHooks`], *optional*): What acts around the steps, from the creation of the scheduler on.
        task_callback ([`TaskSequenceCallback`], *optional*): The bases and the published sequence, once `train` has
            begun.
    """

    model: Any
    args: Any
    accelerator: Any
    processing_class: Any
    optimizer: Any
    eblora_config: EBLoRAConfig
    method: Method
    heads: TaskHeads
    adapter: str
    layers: list[AdaptedLayer]
    tasks: TaskSequence | None
    constraint: StepHooks | None = None
    task_callback: TaskSequenceCallback | None = None
    begun_task = False  # a task is on the model, being learnt
    resumes_trained = False  # from a checkpoint of a task whose training had ended

    @property
    def begun(self) -> TaskSequenceCallback:
        """The bases and the published sequence. Raises a `RuntimeError` before `train` has begun."""
        if self.task_callback is None:
            raise RuntimeError("There is no sequence before `train()` has begun.")
        return self.task_callback

    @property
    def bases(self) -> dict[str, torch.Tensor]:
        """Per layer name the orthonormal basis `(d_in, p)` of the tasks learnt so far."""
        return {} if self.task_callback is None else self.task_callback.bases
