"""InfLoRA (arXiv 2404.00228): frozen lora_A from the task's features outside the basis of earlier tasks' features."""

import torch

from ..adapters.layers import AdaptedLayer
from ..config import EBLoRAConfig
from .keeplora import KeepLoRA


class InfLoRA(KeepLoRA):
    """
    ΔW = γ B A with A frozen as the leading directions of the new task's inputs X outside the basis M of earlier tasks'
    inputs, and B trained from zero.

    The paper calls our A its B. Its memory (DualGPM) stores M or its complement, whichever is smaller; what they span
    is the same, and ours stores M. Its energy threshold rises from task to task; ours is `energy_threshold`
    throughout.
    """

    starts_from = "features"
    merges_earlier_tasks = True

    def __init__(self, config: EBLoRAConfig):
        super().__init__(config)
        self.remembers = "features"

    def _missing(self, layer: AdaptedLayer, basis: torch.Tensor | None) -> None:
        """The weights count for nothing."""
