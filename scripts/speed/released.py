"""
The optimizer of the released EBLoRA code, written anew from its equations and its way with memory: the reference of
the step's cost.

Around torch's default AdamW it keeps a copy of every parameter, stacks the factors of one shape before and after the
step, lora_A transposed, and with them their bases, which are zero-padded to the widest of all and to a multiple of 8;
and it retracts through a batched singular value decomposition.
"""

import torch
from torch import nn


class ReleasedAdamW:
    """
    K_X(g) as the gradient, AdamW, K_X of √(4096/r) times the increment, P_F, polar factor.

    Args:
        lora_B (`list[nn.Parameter]`): U of each layer, `(d_out, r)`.
        lora_A (`list[nn.Parameter]`): Vᵀ of each layer, `(r, d_in)`.
        bases (`list[torch.Tensor | None]`): The basis of each V, `(d_in, p)`.
        lr (`float`): Learning rate.
    """

    def __init__(
        self,
        lora_B: list[nn.Parameter],
        lora_A: list[nn.Parameter],
        bases: list[torch.Tensor | None],
        lr: float,
    ):
        self.adamw = torch.optim.AdamW([*lora_B, *lora_A], lr=lr, weight_decay=0.0)
        width = -(-max((basis.shape[1] for basis in bases if basis is not None), default=0) // 8) * 8
        groups: dict[tuple, list] = {}
        for parameter in lora_B:
            groups.setdefault((parameter.shape, False), []).append((parameter, None))
        for parameter, basis in zip(lora_A, bases, strict=True):
            padded = None if basis is None else nn.functional.pad(basis, (0, width - basis.shape[1]))
            groups.setdefault((parameter.shape, True), []).append((parameter, padded))
        self.groups = [(wide, *map(list, zip(*members, strict=True))) for (_, wide), members in groups.items()]

    @torch.no_grad()
    def step(self) -> None:
        before = [[parameter.detach().clone() for parameter in parameters] for _, parameters, _ in self.groups]
        for (wide, parameters, bases), x in zip(self.groups, before, strict=True):
            gradients = [parameter.grad for parameter in parameters]
            tangents = _tangent(_stack(x, wide), _stack(gradients, wide), _stack(bases))
            for gradient, tangent in zip(gradients, tangents, strict=True):
                gradient.copy_(tangent.mT if wide else tangent)
        self.adamw.step()
        for (wide, parameters, bases), old in zip(self.groups, before, strict=True):
            x, basis = _stack(old, wide), _stack(bases)
            increments = (4096.0 / x.shape[-1]) ** 0.5 * (_stack(parameters, wide) - x)
            left, _, right = torch.linalg.svd(_outside(x + _tangent(x, increments, basis), basis), full_matrices=False)
            for parameter, moved in zip(parameters, left @ right, strict=True):
                parameter.copy_(moved.mT if wide else moved)


def _stack(tensors: list[torch.Tensor | None], wide: bool = False) -> torch.Tensor | None:
    if tensors[0] is None:
        return None
    return torch.stack([tensor.mT for tensor in tensors] if wide else list(tensors))


def _outside(z: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    return z if basis is None else z - basis @ (basis.mT @ z)


def _tangent(x: torch.Tensor, z: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    z = _outside(z, basis)
    return z - x @ (z.mT @ x)
