"""KeepLoRA (ICLR 2026): frozen lora_A outside what earlier tasks and the pre-trained weights use, lora_B trained."""

import torch

from ..config import EBLoRAConfig
from ..layers import AdaptedLayer
from ..subspace import BasisExtension, column_cap, principal_directions, principal_weight_directions
from .base import Method, Tensors


class KeepLoRA(Method):
    """
    ΔW = γ B A with A = Pᵀ frozen, P the leading right singular vectors of the task's gradient outside the basis M, and
    B trained from zero: ΔW M = 0 at every step, whatever the optimizer.

    M starts as the principal input directions of each pre-trained weight, up to the share `weight_energy` of ‖W‖², and
    grows after each task by GPM's energy rule: from gradients (the release for LLaVA) or from features (the release
    for CLIP, `basis_from="features"`). The release for CLIP starts from B = Σ Qᵀ and subtracts A B from the weights; B
    counted from there is the same update, and leaves the weights alone.
    """

    trains_lora_A = False
    starts_from = "gradients"

    def __init__(self, config: EBLoRAConfig):
        super().__init__(config)
        self.remembers = config.basis_from or "gradients"

    def begin_task(self, layers: list[AdaptedLayer], snapshot: Tensors, bases: Tensors) -> dict:
        for layer in layers:
            basis = bases[layer.name] if layer.name in bases else self._first_basis(layer)
            _, _, v = principal_directions(snapshot[layer.name], layer.rank, basis, name=layer.name)
            layer.lora_A.data.copy_(v.T)
        return {}

    def end_task(self, layers: list[AdaptedLayer], snapshot: Tensors, bases: Tensors) -> dict[str, BasisExtension]:
        extensions = {}
        for layer in layers:
            known = bases.get(layer.name)
            basis = self._first_basis(layer) if known is None else known
            extension = self.extend(layer, snapshot[layer.name], basis)
            if known is None and basis is not None:  # the first task brings the principal directions along
                columns = torch.cat([basis.to(extension.columns), extension.columns], dim=1)
                extension = BasisExtension(columns, extension.captured, extension.capped)
            extensions[layer.name] = extension
        return extensions

    def _first_basis(self, layer: AdaptedLayer) -> torch.Tensor | None:
        """The principal directions of a pre-trained weight, leaving room for the adapter; `None` without any."""
        if self.config.weight_energy == 0.0:
            return None
        weight = layer.oriented(layer.weight.detach())
        directions = principal_weight_directions(weight, self.config.weight_energy, name=layer.name)
        return directions[:, : column_cap(layer.d_in, layer.rank, 0, self.config.max_basis_fraction)]
