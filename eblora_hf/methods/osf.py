"""Orthogonal subspace fine-tuning (arXiv 2504.07097): top singular directions of W are frozen, the rest is trained."""

from dataclasses import dataclass
from typing import Any

import torch

from ..adapters.composition import current_weight
from ..adapters.factors import STATE_FILE, decompose_product
from ..adapters.layers import AdaptedLayer
from ..manifold.maps import full_precision, restrict
from ..manifold.step_hooks import StepHooks
from .base import Method, Snapshots, Tensors


@dataclass(frozen=True)
class Protected:
    """
    The frozen singular directions of one weight.

    Args:
        U (`torch.Tensor` of shape `(d_out, k)`): Output side.
        V (`torch.Tensor` of shape `(d_in, k)`): Input side.
    """

    U: torch.Tensor
    V: torch.Tensor


class OSF(Method):
    """
    W = U₁ Σ₁ V₁ᵀ + U₂ Σ₂ V₂ᵀ for the weight W that the task finds, all earlier tasks included. The k leading
    directions U₁, V₁, the fewest with the share `weight_energy` of ‖W‖², are protected; everything else is trained:
    ΔW = B A of rank min(d_in, d_out) - k, from A = V₂ᵀ and B = 0, with U₁ᵀ B = 0 and A V₁ = 0 after every step. Hence
    U₁ᵀ ΔW = 0 and ΔW V₁ = 0 under any optimizer; projecting gradients alone would leak under Adam.

    The paper chooses k by a layer's importance, from the similarity of its inputs and outputs; here it adapts to the
    spectrum. The rank of the `LoraConfig` plays no role. After training ΔW is stored with the fewest directions that
    hold the share `stored_energy` of ‖ΔW‖²; the accuracies are those of what is stored.
    """

    constrained = True

    def ranks(self, layers: list[AdaptedLayer]) -> dict[str, int]:
        ranks = {}
        for layer in layers:
            sigma = torch.linalg.svdvals(current_weight(layer))
            ranks[layer.name] = len(sigma) - _count(sigma, self.config.weight_energy, len(sigma) - 1)
        return ranks

    def begin_task(self, layers: list[AdaptedLayer], snapshot: Snapshots, bases: Tensors) -> dict[str, Protected]:
        protected = {}
        for layer in layers:
            left, _, right = torch.linalg.svd(current_weight(layer), full_matrices=False)
            k = len(right) - layer.rank
            layer.lora_A.data.copy_(right[k:])
            layer.lora_B.data.zero_()
            protected[layer.name] = Protected(left[:, :k].contiguous(), right[:k].T.contiguous())
        return protected

    def constrain(
        self,
        optimizer: torch.optim.Optimizer,
        layers: list[AdaptedLayer],
        start: dict[str, Any],
        bases: Tensors,
        num_training_steps: int,
    ) -> "ProtectedDirections":
        return ProtectedDirections(optimizer, layers, start)

    def resume(self, layers: list[AdaptedLayer], state: Tensors) -> dict[str, Protected]:
        try:
            return {layer.name: Protected(state[f"{layer.name}.U"], state[f"{layer.name}.V"]) for layer in layers}
        except KeyError as error:
            raise ValueError(
                f"{STATE_FILE} does not belong to this model: it has no {error}. Resume with the method and target "
                "modules of the checkpoint."
            ) from error

    @torch.no_grad()
    def finish_training(self, layers: list[AdaptedLayer]) -> None:
        for layer in layers:
            if not layer.lora_A.any(dim=1).all():
                continue  # done before, by a run that then failed
            left, sigma, right = decompose_product(layer.lora_B, layer.lora_A)
            kept = _count(sigma, self.config.stored_energy, len(sigma))
            root = sigma[:kept].sqrt()
            layer.lora_A.zero_()
            layer.lora_B.zero_()
            layer.lora_A[:kept] = (root.unsqueeze(-1) * right[:kept]).to(layer.lora_A.dtype)
            layer.lora_B[:, :kept] = (left[:, :kept] * root).to(layer.lora_B.dtype)


class ProtectedDirections(StepHooks):
    """
    Keeps a trained update out of protected directions: after each step, U₁ᵀ B = 0 and A V₁ = 0 for every layer.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer that trains the adapter.
        layers (`list[AdaptedLayer]`): Its layers.
        protected (`dict[str, Protected]`): What is protected, by layer name.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layers: list[AdaptedLayer], protected: dict[str, Protected]):
        super().__init__(optimizer)
        self.layers = layers
        self.protected = {
            layer.name: Protected(
                protected[layer.name].U.to(layer.lora_B.device), protected[layer.name].V.to(layer.lora_A.device)
            )
            for layer in layers
        }
        self.attach()

    def after_step(self) -> None:
        with full_precision():
            for layer in self.layers:
                directions = self.protected[layer.name]
                layer.lora_B.copy_(restrict(layer.lora_B.to(directions.U.dtype), directions.U))
                layer.lora_A.copy_(restrict(layer.lora_A.T.to(directions.V.dtype), directions.V).T)

    def state_dict(self) -> Tensors:
        state = {f"{name}.U": directions.U for name, directions in self.protected.items()}
        return state | {f"{name}.V": directions.V for name, directions in self.protected.items()}


def _count(sigma: torch.Tensor, share: float, most: int) -> int:
    """The fewest leading singular values that hold a share of the energy, at least one and at most so many."""
    energies = sigma.double().square()
    held = energies.cumsum(0) / energies.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return max(1, min(int((held < share).sum()) + 1, most))
