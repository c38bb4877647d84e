"""O-LoRA (arXiv 2310.14152): a penalty keeps the subspaces of the tasks' lora_A apart."""

from typing import Any

import torch

from ..adapters.composition import EARLIER_TASKS
from ..adapters.layers import AdaptedLayer
from ..manifold.step_hooks import StepHooks
from .base import Tensors
from .lora import SequentialLoRA


class OLoRA(SequentialLoRA):
    """
    Sequential LoRA with λ Σ_{i<t} ‖A_i A_tᵀ‖² added to the loss of task t, summed over the layers (eq. 8 of the
    paper). λ is `orthogonality_weight`. The earlier A_i are those of the published sequence, so nothing else is
    remembered.
    """

    constrained = True
    merges_earlier_tasks = False

    def constrain(
        self,
        optimizer: torch.optim.Optimizer,
        layers: list[AdaptedLayer],
        start: dict[str, Any],
        bases: Tensors,
        num_training_steps: int,
    ) -> "OrthogonalityPenalty":
        return OrthogonalityPenalty(optimizer, layers, self.config.orthogonality_weight)


class OrthogonalityPenalty(StepHooks):
    """
    Adds the gradient of λ ‖A₋ Aᵀ‖², 2 λ A A₋ᵀ A₋, to that of each lora_A, with A₋ `(R, d_in)` the rows of all earlier
    tasks.

    It is added after gradient clipping, as decoupled weight decay is, and so does not depend on how the loss is
    averaged over accumulated batches and processes. The logged loss does not contain it.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer that trains the adapter.
        layers (`list[AdaptedLayer]`): Its layers, with the earlier tasks as a frozen adapter beside it, if any.
        weight (`float`): λ.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layers: list[AdaptedLayer], weight: float):
        super().__init__(optimizer)
        self.weight = weight
        self._pairs = [
            (layer.lora_A, layer.module.lora_A[EARLIER_TASKS].weight)
            for layer in layers
            if EARLIER_TASKS in layer.module.lora_A
        ]
        self.attach()

    def penalty(self) -> float:
        """The value of λ Σ ‖A₋ Aᵀ‖²."""
        return self.weight * sum((earlier @ a.T).square().sum().item() for a, earlier in self._pairs)

    def before_step(self) -> None:
        for a, earlier in self._pairs:
            if a.grad is not None:
                overlap = a.to(earlier.dtype) @ earlier.T  # (r, R)
                a.grad.add_(2.0 * self.weight * self.gradient_scale * (overlap @ earlier).to(a.grad.dtype))
