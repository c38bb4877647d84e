"""EBO: EBLoRA's energy-balanced, orthonormal updates without the gradient subspace of earlier tasks (its ablation)."""

from ..adapters.layers import AdaptedLayer
from ..config import EBLoRAConfig
from ..memory.basis import BasisExtension
from .base import Snapshots, Tensors
from .eblora import EBLoRA


class EBO(EBLoRA):
    """ΔW = s U Vᵀ with U, V orthonormal; nothing is remembered of a task, so nothing is avoided (arXiv 2602.00722)."""

    def __init__(self, config: EBLoRAConfig):
        super().__init__(config)
        self.remembers = None

    def end_task(self, layers: list[AdaptedLayer], snapshot: Snapshots, bases: Tensors) -> dict[str, BasisExtension]:
        return {}
