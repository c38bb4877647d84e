"""The parts of a step on the Stiefel manifold as an optimizer's hooks take it: batched, in place, no decomposition.

All work on stacks `(n, d, r)` of tall factors. A stack may be the view `.mT` of contiguous memory, which is how lora_A
lies in a model: products are then computed in the memory's own order, without a copy. The maps are those of
`maps.py`; a step costs 12 r floating-point operations per element of a factor, and under a basis of p columns 8 p
more.
"""

import math

import torch

from .maps import in_span


def tangent_(z: torch.Tensor, x: torch.Tensor, basis: torch.Tensor | None, tangent: str) -> torch.Tensor:
    """
    Turns Euclidean gradients `z` into tangent vectors, in place.

    Args:
        z (`torch.Tensor` of shape `(n, d, r)`): Overwritten.
        x (`torch.Tensor` of shape `(n, d, r)`): Orthonormal factors.
        basis (`torch.Tensor` of shape `(n, d, p)`, *optional*): Directions to avoid.
        tangent (`str`): `"canonical"` or `"orthogonal"`, for [`canonical_tangent`] or [`orthogonal_tangent`].

    Returns:
        `torch.Tensor` of shape `(n, r, r)`: Xᵀ P_F Z of the gradients as they were.
    """
    _restrict(z, basis)
    inner = x.mT @ z
    _add_product(z, x, in_span(inner, tangent), alpha=-1.0)
    return inner


def move_(
    delta: torch.Tensor, x: torch.Tensor, basis: torch.Tensor | None, tangent: str, factor: float
) -> torch.Tensor:
    """
    Turns increments Δ of an optimizer into Y = P_F (X + δ), δ the tangent part of `factor`·Δ, in place.

    For X orthonormal and outside the basis, P_F (X + K_X(κΔ; F)) = P_F (X (I - κA) + κΔ) with A taken from XᵀΔ alone:
    one projection instead of two, applied last, so that rounding does not drift into the span of F. Either tangent map
    makes XᵀD skew for D = Y - X, hence YᵀY = I + DᵀD never comes near singular.

    Args:
        delta (`torch.Tensor` of shape `(n, d, r)`): Increments; overwritten by Y.
        x (`torch.Tensor` of shape `(n, d, r)`): Orthonormal factors outside the basis.
        basis (`torch.Tensor` of shape `(n, d, p)`, *optional*): Directions to avoid.
        tangent (`str`): `"canonical"` or `"orthogonal"`.
        factor (`float`): κ.

    Returns:
        `torch.Tensor` of shape `(n, r, r)`: YᵀY.
    """
    small = in_span(x.mT @ delta, tangent) * -factor
    small.diagonal(dim1=-2, dim2=-1).add_(1.0)  # I - κA
    _add_product(delta, x, small, beta=factor)
    _restrict(delta, basis)
    # sums of fewer than 16 products side by side are taken one term after another, and round too often
    y = delta.double() if delta.shape[-1] < 16 else delta
    return y.mT @ y


def inverse_root(gram: torch.Tensor, largest: float | None = None) -> torch.Tensor:
    """
    G^(-1/2) of Gram matrices G = I + DᵀD by a scaled Newton-Schulz iteration: products of small matrices only.

    The iteration runs in the dtype of `gram`, and a last step in float64 takes its rounding off.

    Args:
        gram (`torch.Tensor` of shape `(n, r, r)`): Symmetric, no eigenvalue below 1. A non-finite matrix gives NaN.
        largest (`float`, *optional*): What the row sums of |G| stay below; it sets the number of iterations, and a
            matrix beyond it becomes NaN. By default it is read from `gram`, for which the host waits for the device.

    Returns:
        `torch.Tensor` of shape `(n, r, r)`, in float64.
    """
    row_sums = gram.abs().sum(dim=-1).amax(dim=-1)  # ‖G‖_∞, at least the largest eigenvalue, (n,)
    limit = torch.nan_to_num(row_sums.max(), nan=1.0, posinf=1.0).item() if largest is None else largest
    three_halves = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).mul(1.5).expand_as(gram)
    if limit > 2.0:
        bound = row_sums[:, None, None]
        y, worst = gram / bound, 1.0 / limit
    else:  # the iteration converges as it is
        bound, y, worst = None, gram, limit
    # Y -> G^(1/2) and Z -> G^(-1/2), up to the bound; `worst` is the eigenvalue of ZY farthest from 1
    t = z = torch.add(three_halves, y, alpha=-0.5)
    worst *= (3.0 - worst) ** 2 / 4.0
    while abs(1.0 - worst) > 0.1 * torch.finfo(gram.dtype).eps ** 0.5:  # the last step squares what is left
        y = y @ t
        t = torch.baddbmm(three_halves, z, y, alpha=-0.5)
        z = t @ z
        worst *= (3.0 - worst) ** 2 / 4.0
    z = (z if bound is None else z * bound.rsqrt()).double()
    root = z @ torch.baddbmm(three_halves.double(), z.mT @ gram.double(), z, alpha=-0.5)
    return root if largest is None else torch.where(row_sums[:, None, None] <= largest, root, math.nan)


def retract_(x: torch.Tensor, y: torch.Tensor, root: torch.Tensor) -> None:
    """Overwrites `x` by the polar factor of Y `(n, d, r)`, given (YᵀY)^(-1/2) `(n, r, r)`."""
    root = root.to(x.dtype)
    if x.is_contiguous():
        torch.bmm(y, root, out=x)
    else:
        torch.bmm(root.mT, y.mT, out=x.mT)


def _restrict(z: torch.Tensor, basis: torch.Tensor | None) -> None:
    """Removes in place from `z` what lies in the span of `basis`."""
    if basis is None:
        return
    # on a CPU one basis for each thread at a time: it is then still close when the second product reads it
    at_once = torch.get_num_threads() if z.device.type == "cpu" else len(z)
    for part, of_part in zip(z.split(at_once), basis.split(at_once), strict=True):
        _add_product(part, of_part, of_part.mT @ part, alpha=-1.0)


def _add_product(y: torch.Tensor, x: torch.Tensor, small: torch.Tensor, beta: float = 1.0, alpha: float = 1.0) -> None:
    """y <- β y + α x small, in place and in the memory order of `y`."""
    if y.is_contiguous():
        y.baddbmm_(x, small, beta=beta, alpha=alpha)
    else:
        y.mT.baddbmm_(small.mT, x.mT, beta=beta, alpha=alpha)
