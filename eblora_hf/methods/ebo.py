"""EBO: EBLoRA's energy-balanced, orthonormal updates without the gradient subspace of earlier tasks (its ablation)."""

from ..factors import Factors
from ..layers import AdaptedLayer
from ..subspace import BasisExtension
from .base import Tensors
from .eblora import EBLoRA


class EBO(EBLoRA):
    """ΔW = s U Vᵀ with U, V orthonormal; nothing is remembered of a task, so nothing is avoided (arXiv 2602.00722)."""

    keeps_bases = False

    def begin_task(self, layers: list[AdaptedLayer], gradients: Tensors, bases: Tensors) -> dict[str, Factors]:
        return super().begin_task(layers, gradients, {})

    def end_task(self, layers: list[AdaptedLayer], gradients: Tensors, bases: Tensors) -> dict[str, BasisExtension]:
        return {}
