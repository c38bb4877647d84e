"""Sequential LoRA: a fresh adapter per task, trained without constraint on top of the earlier ones. The baseline."""

import torch

from ..layers import AdaptedLayer
from .base import Method, Tensors


class SequentialLoRA(Method):
    """
    Plain LoRA (arXiv 2106.09685), task after task: A is drawn anew as PEFT does, B starts at zero, any optimizer
    trains.
    """

    def begin_task(self, layers: list[AdaptedLayer], snapshot: Tensors, bases: Tensors) -> dict:
        for layer in layers:
            torch.nn.init.kaiming_uniform_(layer.lora_A, a=5**0.5)
            torch.nn.init.zeros_(layer.lora_B)
        return {}
