"""EBLoRA (arXiv 2602.00722): energy-balanced updates outside the gradient subspace of earlier tasks."""

import dataclasses
from typing import Any

import torch

from ..adapters.factors import Factors, factors_from_state
from ..adapters.layers import AdaptedLayer
from ..config import EBLoRAConfig
from ..manifold.constraint import StiefelConstraint
from ..manifold.penalty import KroneckerPenalty
from ..memory.basis import BasisExtension
from ..memory.budget import kept_directions
from ..memory.curvature import CurvatureMoments, output_root
from .base import Method, Snapshots, Tensors

# Measured on the embedded benchmark (60 steps): directions move by about 25 in sum over a task, s by about 1.2. What
# holds earlier tasks and the pre-training lets it move further: the penalty by half, an anchor to three times as much
_DIRECTION_TRAVEL = 25.0
_SCALE_TRAVEL = 1.2
_WITH_PENALTY, _WITH_ANCHOR = 1.5, 3.0
_MAX_DIRECTION_LR = 0.5
_MAX_SCALE_LR = 0.05
_SCALE_OUTSIDE_BLOCKS = -0.005  # the released code's constant for layers without a layer index


def initial_scale(depth: int | None, num_layers: int, alpha: float, beta: float) -> float:
    """
    The singular value a layer's update starts with, s = -(α + β l / (L - 1)): larger towards the output.

    It is negative because U Vᵀ points along the gradient, and descent goes against it.

    Args:
        depth (`int`, *optional*): Layer index l, counted from 0; `None` for a layer outside any transformer block.
        num_layers (`int`): Number L of transformer blocks; a single block gets -α.
        alpha (`float`): Absolute value at the first block.
        beta (`float`): How much larger it is at the last block.

    Example:

    >>> [round(initial_scale(depth, 3, alpha=0.002, beta=0.008), 3) for depth in (0, 1, 2)]
    [-0.002, -0.006, -0.01]
    """
    if depth is None:
        return _SCALE_OUTSIDE_BLOCKS
    return -(alpha + beta * depth / (num_layers - 1)) if num_layers > 1 else -alpha


class EBLoRA(Method):
    """
    ΔW = s U Vᵀ with U, V orthonormal and V outside the basis F of earlier tasks' gradients.

    A task starts from the leading r singular directions of its gradient outside F, with one small scale per layer.
    Every step keeps UᵀU = VᵀV = I and FᵀV = 0. Afterwards F grows by GPM's energy rule at the trained weights: from
    the second moment of the gradients of single tokens, or as published from their mean (`basis_from="gradients"`).
    What earlier tasks react to outside F costs a penalty ([`KroneckerPenalty`]); with none it is EBLoRA as published.
    """

    constrained = True
    orthonormal = True
    starts_from = "gradients"

    def __init__(self, config: EBLoRAConfig):
        super().__init__(config)
        self.remembers = config.basis_from or "token-gradients"
        if self.remembers == "token-gradients" and config.penalty_weight:
            self.remembers = "curvature"

    def begin_task(self, layers: list[AdaptedLayer], snapshot: Snapshots, bases: Tensors) -> dict[str, Factors]:
        config, factors = self.config, {}
        for layer in layers:
            u, _, v = self.principal(layer, snapshot[layer.name], bases.get(layer.name))
            num_layers = config.num_layers or layer.num_blocks
            s = initial_scale(layer.depth, num_layers, config.init_scale_alpha, config.init_scale_beta)
            factors[layer.name] = Factors(u, v, s)
        return factors

    def constrain(
        self,
        optimizer: torch.optim.Optimizer,
        layers: list[AdaptedLayer],
        start: dict[str, Factors],
        bases: Tensors,
        num_training_steps: int,
    ) -> StiefelConstraint:
        config = self.config
        direction_lr = min(_DIRECTION_TRAVEL / num_training_steps, _MAX_DIRECTION_LR)
        further = _WITH_ANCHOR if self.anchored else _WITH_PENALTY if self.remembers == "curvature" else 1.0
        scale_lr = further * min(_SCALE_TRAVEL / num_training_steps, _MAX_SCALE_LR)
        return StiefelConstraint(
            optimizer,
            layers,
            start,
            bases,
            direction_lr=direction_lr if config.direction_lr == "auto" else float(config.direction_lr),
            scale_lr=scale_lr if config.scale_lr == "auto" else float(config.scale_lr),
            step_scaling=config.step_scaling,
            step_constant=config.step_constant,
            tangent=config.tangent,
            scale_weight_decay=config.scale_weight_decay,
            penalty=self._penalty(),
        )

    def _penalty(self) -> KroneckerPenalty | None:
        weight = self.config.penalty_weight
        return KroneckerPenalty(self.curvatures, weight) if self.curvatures and weight else None

    def resume(self, layers: list[AdaptedLayer], state: Tensors) -> dict[str, Factors]:
        return factors_from_state(state, layers)

    def end_task(
        self, layers: list[AdaptedLayer], snapshot: dict[str, Any], bases: Tensors
    ) -> dict[str, BasisExtension]:
        return {layer.name: self._extend(layer, snapshot[layer.name], bases.get(layer.name)) for layer in layers}

    def _extend(self, layer: AdaptedLayer, seen: Any, basis: torch.Tensor | None) -> BasisExtension:
        """The extension of a layer's basis, and the roots of its curvature."""
        if not isinstance(seen, CurvatureMoments):
            return self.extend(layer, seen, basis)
        directions = kept_directions(layer.rank)
        extension = self.extend(layer, seen.inputs, basis, beyond=directions)
        return dataclasses.replace(extension, outputs=output_root(seen, directions))
