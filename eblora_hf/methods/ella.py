"""ELLA (arXiv 2601.02232): a penalty keeps a task's update small where earlier ones are large."""

from typing import Any

import torch

from ..adapters.composition import EARLIER_TASKS
from ..adapters.layers import AdaptedLayer
from ..manifold.step_hooks import StepHooks
from .base import Tensors
from .lora import SequentialLoRA


class ELLA(SequentialLoRA):
    """
    Sequential LoRA with λ ‖ΔW ∘ W₋‖² added to the loss of a task, summed over the layers, with ∘ the product entry by
    entry and W₋ the sum of the earlier tasks' updates. λ is `overlap_weight`. W₋ is that of the published sequence, so
    nothing else is remembered.
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
    ) -> "OverlapPenalty":
        return OverlapPenalty(optimizer, layers, self.config.overlap_weight)


class OverlapPenalty(StepHooks):
    """
    Adds the gradient of λ ‖ΔW ∘ W₋‖² to those of lora_A and lora_B, with ΔW = γ B A and W₋ `(d_out, d_in)`.

    It is added after gradient clipping, as decoupled weight decay is, and so does not depend on how the loss is
    averaged over accumulated batches and processes. The logged loss does not contain it. W₋ is multiplied out a layer
    at a time in every step, so that it takes no memory.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer that trains the adapter.
        layers (`list[AdaptedLayer]`): Its layers, with the earlier tasks as a frozen adapter beside it, if any.
        weight (`float`): λ.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layers: list[AdaptedLayer], weight: float):
        super().__init__(optimizer)
        self.weight = weight
        self._layers = [layer for layer in layers if EARLIER_TASKS in layer.module.lora_A]
        self.attach()

    def penalty(self) -> float:
        """The value of λ Σ ‖ΔW ∘ W₋‖²."""
        return self.weight * sum((_update(layer) * _earlier(layer)).square().sum().item() for layer in self._layers)

    def before_step(self) -> None:
        for layer in self._layers:
            if layer.lora_B.grad is None:
                continue
            slope = _update(layer) * _earlier(layer).square()  # half the derivative by ΔW, over λ; (d_out, d_in)
            slope *= 2.0 * self.weight * self.gradient_scale * layer.scaling
            for parameter, gradient in (
                (layer.lora_A, layer.lora_B.to(slope.dtype).T @ slope),  # (r, d_in)
                (layer.lora_B, slope @ layer.lora_A.to(slope.dtype).T),  # (d_out, r)
            ):
                if parameter.grad is not None:
                    parameter.grad.add_(gradient.to(parameter.grad.dtype))


def _update(layer: AdaptedLayer) -> torch.Tensor:
    """ΔW of the task, in float32 or wider."""
    wide = torch.promote_types(layer.lora_B.dtype, torch.float32)
    return layer.scaling * (layer.lora_B.to(wide) @ layer.lora_A.to(wide))


def _earlier(layer: AdaptedLayer) -> torch.Tensor:
    """The sum of the earlier tasks' updates, in float32 or wider."""
    a, b = layer.module.lora_A[EARLIER_TASKS].weight, layer.module.lora_B[EARLIER_TASKS].weight
    wide = torch.promote_types(b.dtype, torch.float32)
    return layer.module.scaling[EARLIER_TASKS] * (b.to(wide) @ a.to(wide))
