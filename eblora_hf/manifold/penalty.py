"""What it costs a new task to change what earlier tasks react to: a quadratic penalty by Kronecker factors.

Online structured Laplace (Ritter, Botev and Barber, arXiv 1805.07810) over K-FAC (Martens and Grosse, arXiv
1503.05671): the curvature of earlier tasks' losses in a weight is taken for O ⊗ C, of the layer's outputs and inputs.
Both are kept as roots of low rank, which take little room, and a few thin products a step.
"""

from dataclasses import dataclass
from typing import Any

import torch

MOST_COLUMNS = 256  # of the roots of all tasks together


@dataclass(frozen=True)
class Curvature:
    """
    The curvature O ⊗ C of a task's loss in one layer.

    Args:
        inputs (`torch.Tensor` of shape `(d_in, p)`): X with C = X Xᵀ.
        outputs (`torch.Tensor` of shape `(d_out, q)`): Y with O = Y Yᵀ.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor


def join_curvatures(tasks: list[Curvature]) -> Curvature:
    """
    That of several tasks: the mean of their C and the sum of their O, so that it does not grow with them.

    Where the roots together have more than 256 columns, those of the largest energy are kept: a choice, and no
    decomposition, which might differ in the last bit from process to process.
    """
    inputs = torch.cat([task.inputs.float() for task in tasks], dim=1) / len(tasks) ** 0.5
    outputs = torch.cat([task.outputs.float() for task in tasks], dim=1)
    return Curvature(_fewer_columns(inputs), _fewer_columns(outputs))


def _fewer_columns(root: torch.Tensor) -> torch.Tensor:
    """The longest columns of a root, in their order."""
    if root.shape[1] <= MOST_COLUMNS:
        return root
    longest = root.square().sum(dim=0).argsort(descending=True, stable=True)[:MOST_COLUMNS]
    return root[:, longest.sort().values]


class KroneckerPenalty:
    """
    β/2 Σ tr(ΔWᵀ O ΔW C) over the layers, with ΔW = s U Vᵀ the update of the task that is learnt.

    Args:
        curvatures (`dict[str, Curvature]`): By layer name; a layer left out costs nothing.
        weight (`float`): β.
    """

    def __init__(self, curvatures: dict[str, Curvature], weight: float):
        self._curvatures, self.weight = dict(curvatures), weight

    def add_slope(
        self, z: torch.Tensor, name: str, u: torch.Tensor, v: torch.Tensor, s: torch.Tensor, *, of_v: bool, scale: Any
    ) -> None:
        """
        Adds to a gradient that of the penalty in one layer.

        Args:
            z (`torch.Tensor`): dL/dV `(d_in, r)` or dL/d(sU) `(d_out, r)`, changed in place.
            name (`str`): Of the layer.
            u (`torch.Tensor` of shape `(d_out, r)`), v (`torch.Tensor` of shape `(d_in, r)`), s (`torch.Tensor`): The
                factors of its update.
            of_v (`bool`): Which of the two z is.
            scale (`float` or `torch.Tensor`): What the penalty is multiplied by.
        """
        held = self._curvatures.get(name)
        if held is None:
            return
        if held.inputs.device != u.device or held.inputs.dtype != u.dtype:
            held = self._curvatures[name] = Curvature(held.inputs.to(u), held.outputs.to(u))
        x, y = held.inputs, held.outputs  # (d_in, p), (d_out, q)
        a, b = x.mT @ v, y.mT @ u  # (p, r), (q, r)
        if of_v:
            z.add_(x @ (a @ (b.mT @ b)) * (scale * self.weight * s * s))  # s² C V (Uᵀ O U)
        else:
            z.add_(y @ (b @ (a.mT @ a)) * (scale * self.weight * s))  # s O U (Vᵀ C V)
