"""KeepLoRA (ICLR 2026): frozen lora_A outside what earlier tasks and the pre-trained weights use, lora_B trained."""

from dataclasses import replace

import torch

from ..adapters.layers import AdaptedLayer
from ..config import EBLoRAConfig
from ..manifold.maps import restrict
from ..memory.basis import (
    BasisExtension,
    column_cap,
    orthonormalize_against,
    principal_weight_directions,
)
from .base import Method, Snapshot, Snapshots, Tensors

_HELD = 1e-3  # what is left of a direction outside a basis that holds it, with room for bases stored in bf16


class KeepLoRA(Method):
    """
    ΔW = γ B A with A = Pᵀ frozen, P the leading right singular vectors of the task's gradient outside the basis M, and
    B trained from zero: ΔW M = 0 at every step, whatever the optimizer, to the rounding of lora_A's dtype.

    M starts as the principal input directions of each pre-trained weight, up to the share `weight_energy` of ‖W‖², and
    grows after each task by GPM's energy rule: from gradients (the release for LLaVA) or from features (the release
    for CLIP, `basis_from="features"`). The release for CLIP starts from B = Σ Qᵀ and subtracts A B from the weights; B
    counted from there is the same update, and leaves the weights alone.
    """

    trains_lora_A = False
    merges_earlier_tasks = False  # it looks at the pre-trained weights
    starts_from: Snapshot | None = "gradients"

    def __init__(self, config: EBLoRAConfig):
        super().__init__(config)
        self.remembers = config.basis_from or "gradients"

    def begin_task(self, layers: list[AdaptedLayer], snapshot: Snapshots, bases: Tensors) -> dict:
        for layer in layers:
            basis = _joined(bases.get(layer.name), self._missing(layer, bases.get(layer.name)))
            _, _, v = self.principal(layer, snapshot[layer.name], basis)
            layer.lora_A.data.copy_(v.T)
        return {}

    def end_task(self, layers: list[AdaptedLayer], snapshot: Snapshots, bases: Tensors) -> dict[str, BasisExtension]:
        extensions = {}
        for layer in layers:
            missing = self._missing(layer, bases.get(layer.name))
            extension = self.extend(layer, snapshot[layer.name], _joined(bases.get(layer.name), missing))
            if missing is not None and missing.shape[1]:  # the first task brings the principal directions along
                columns = torch.cat([missing.to(extension.columns), extension.columns], dim=1)
                extension = replace(extension, columns=columns, energies=None)  # not in the order of the task's energy
            extensions[layer.name] = extension
        return extensions

    def _missing(self, layer: AdaptedLayer, basis: torch.Tensor | None) -> torch.Tensor | None:
        """
        The principal directions of a pre-trained weight that a basis does not hold: all of them before the first task,
        none after a task of KeepLoRA. They leave room for the adapter.
        """
        if self.config.weight_energy == 0.0:
            return None
        directions = principal_weight_directions(layer.dense_weight(), self.config.weight_energy, name=layer.name)
        if basis is not None:
            basis = basis.to(directions)
            left, sigma, _ = torch.linalg.svd(restrict(directions, basis), full_matrices=False)
            directions = orthonormalize_against(left[:, sigma > _HELD], basis)
        taken = 0 if basis is None else basis.shape[1]
        return directions[:, : column_cap(layer.d_in, layer.rank, taken, self.config.max_basis_fraction)]


def _joined(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return torch.cat([first.to(second), second], dim=1)
