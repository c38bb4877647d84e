"""Orthonormal bases of the subspaces earlier tasks live in: the GPM energy rule, its extension, principal directions.

A gradient G or weight W has shape `(d_out, d_in)`; every basis F lies on the input side and has shape `(d_in, p)` with
orthonormal columns. Sources: GPM (arXiv 2103.09762), EBLoRA (arXiv 2602.00722), KeepLoRA for the rule on weights.
"""

from dataclasses import dataclass

import torch

from ..manifold.maps import check_feasible, full_precision, restrict
from .spectrum import leading_directions, noise_energy, principal_triplets, rounding_of

_ROUNDING = 1e-5  # share of the energy that may be missing at a threshold that only noise would reach


@dataclass(frozen=True)
class BasisExtension:
    """
    What one task adds to the basis of one layer.

    Args:
        columns (`torch.Tensor` of shape `(d_in, k)`): New orthonormal columns, orthogonal to the basis before; k may
            be 0.
        captured (`float`): Share of the gradient's energy ‖G‖² inside the extended basis, between 0 and 1.
        capped (`bool`): Whether a cap on the columns stopped the extension below the energy threshold.
        energies (`torch.Tensor` of shape `(k,)`, *optional*): `captured` after each of the columns.
        inside (`float`): `captured` without them.
        beyond (`torch.Tensor` of shape `(d_in, m)`, *optional*): The directions that follow them, each by the root of
            its share of the energy.
        outputs (`torch.Tensor` of shape `(d_out, q)`, *optional*): A root of the layer's curvature on the side of its
            outputs, as in [`Curvature`].
    """

    columns: torch.Tensor
    captured: float
    capped: bool = False
    energies: torch.Tensor | None = None
    inside: float = 0.0
    beyond: torch.Tensor | None = None
    outputs: torch.Tensor | None = None


def extend_basis(
    matrix: torch.Tensor,
    basis: torch.Tensor | None = None,
    *,
    threshold: float = 0.99,
    max_columns: int | None = None,
    second_moment: bool = False,
    total: float | None = None,
    inside: float | None = None,
    beyond: int = 0,
    name: str = "gradient",
) -> BasisExtension:
    """
    GPM's energy rule: the fewest new directions with which the basis holds at least `threshold` of the gradient's
    energy.

    With E = ‖G‖² and the residual R = G - (G F) Fᵀ of singular values σ, the basis already holds a₀ = (E - ‖R‖²) / E
    and k = min {k : a₀ + Σ_{i≤k} σᵢ² / E >= threshold}; the new columns are the leading k right singular vectors of R.
    For a first task F is empty and a₀ = 0. Large matrices of low rank are searched at random, see
    [`leading_directions`]: the captured energy is then that of the columns found, and k at most one larger.

    Args:
        matrix (`torch.Tensor` of shape `(d_out, d_in)`): Mean gradient G of a task with respect to a weight.
        basis (`torch.Tensor` of shape `(d_in, p)`, *optional*): Orthonormal basis of the tasks before.
        threshold (`float`, defaults to 0.99): Share of the energy to capture, in (0, 1].
        max_columns (`int`, *optional*): Cap on k; the columns of largest energy are kept.
        second_moment (`bool`, defaults to `False`): The matrix is K = GᵀG `(d_in, d_in)`, whose energy is its trace.
        total (`float`, *optional*): E, where it is known and `matrix` is a part of what it belongs to (a sketch).
        inside (`float`, *optional*): The energy in the basis, where it is known and `matrix` is of the rest.
        beyond (`int`, defaults to 0): How many directions after the new columns are wanted as well, if that many have
            been found.
        name (`str`): Layer to name in errors.

    Returns:
        [`BasisExtension`] in the matrix's dtype (float32 for half precision).

    Raises:
        ValueError: if the matrix is all zero or not finite, a shape or the threshold is wrong, or a sketch holds less
            than the threshold.

    Example:

    >>> extension = extend_basis(torch.diag(torch.tensor([3.0, 1.0, 0.1])), threshold=0.85)
    >>> extension.columns.abs().tolist(), round(extension.captured, 3)  # 9 of 10.01
    ([[1.0], [0.0], [0.0]], 0.899)
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold is the share of energy to capture and lies in (0, 1], got {threshold}.")
    matrix = check_gradient(matrix, name)
    basis = None if basis is None else basis.to(matrix)
    if basis is not None and basis.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"{name}: a basis of shape {tuple(basis.shape)} does not fit a gradient of shape {tuple(matrix.shape)}: "
            f"expected ({matrix.shape[1]}, p)."
        )
    with full_precision():
        energy = _trace if second_moment else _energy
        residual = outside(matrix, basis, second_moment=second_moment)
        held, rest = energy(matrix), energy(residual)  # no decomposition needed
        total = held if total is None else total
        inside = ((held - rest) if inside is None else inside) / total if basis is not None else 0.0  # a₀
        directions, found = leading_directions(residual, (threshold - inside) * total, second_moment=second_moment)
        energies = inside + found.cumsum(0) / total  # a₁, a₂, …
        # a sum that only seems to reach the threshold would not do
        wanted = 0 if inside >= threshold else int((energies < threshold + rounding_of(matrix)).sum()) + 1
        noise = noise_energy(matrix, found[:1].sum().item(), second_moment=second_moment)
        available = int((found > noise).sum())
        if available < wanted and (energies[available - 1] if available else inside) < threshold - _ROUNDING:
            available = min(wanted, len(found))  # so much is no noise
        kept = min(wanted, available if max_columns is None else min(available, max_columns))
        columns = orthonormalize_against(directions[:, :kept], basis)  # (d_in, k)
        following = slice(kept, min(kept + beyond, max(available, kept)))
        roots = (found[following] / total).sqrt().to(directions)
    captured = float(energies[kept - 1]) if kept > 0 else float(inside)
    return BasisExtension(
        columns.contiguous(),
        captured,
        kept < min(wanted, available),
        energies[:kept].cpu(),
        float(inside),
        (directions[:, following] * roots).contiguous() if beyond else None,
    )


def outside(matrix: torch.Tensor, basis: torch.Tensor | None, *, second_moment: bool = False) -> torch.Tensor:
    """
    What of a matrix lies outside a basis: G P `(d_out, d_in)`, or P K P of a second moment, with P = I - F Fᵀ.
    """
    residual = restrict(matrix.mT, basis).mT
    if second_moment and basis is not None:
        residual = restrict(residual, basis)
        residual = (residual + residual.mT) / 2
    return residual


def orthonormalize_against(columns: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    """
    Makes nearly orthonormal `columns` orthonormal, and orthogonal to `basis`, to the rounding floor of the dtype.

    Two passes of projection and a Newton step towards the polar factor, which squares the deviation: one pass leaves
    what rounding of the first projection left behind, and over tasks it adds up.

    Args:
        columns (`torch.Tensor` of shape `(d, k)`): Columns orthonormal to some per cent (bf16 keeps three digits),
            outside the span of `basis` to as much.
        basis (`torch.Tensor` of shape `(d, p)`, *optional*): Orthonormal columns.

    Returns:
        `torch.Tensor` of shape `(d, k)`.
    """
    identity = torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
    for _ in range(2):
        columns = restrict(columns, basis)
        columns = columns + columns @ (identity - columns.mT @ columns) / 2
    return columns


def join_basis(basis: torch.Tensor | None, columns: torch.Tensor) -> torch.Tensor:
    """
    A basis with the columns that a task has added, in float32.

    Args:
        basis (`torch.Tensor` of shape `(d, p)`, *optional*): The basis before.
        columns (`torch.Tensor` of shape `(d, k)`): The columns as they are stored; in low precision they are made
            orthonormal again, to each other and to the basis.
    """
    rounded = torch.finfo(columns.dtype).bits < 32
    columns = columns.float()
    if rounded:
        columns = orthonormalize_against(columns, basis)
    return columns if basis is None else torch.cat([basis, columns], dim=1)


def principal_directions(
    gradient: torch.Tensor, rank: int, basis: torch.Tensor | None = None, *, name: str = "gradient"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The leading singular triplets of a gradient outside a basis, from which the factors of a task start (EBLoRA sec.
    4).

    R = G - (G F) Fᵀ ≈ U diag(σ) Vᵀ, with uᵢᵀ R vᵢ = σᵢ > 0: U Vᵀ points along the gradient, descent takes a negative
    s.

    Args:
        gradient (`torch.Tensor` of shape `(d_out, d_in)`): Mean gradient of the task.
        rank (`int`): Number r of triplets.
        basis (`torch.Tensor` of shape `(d_in, p)`, *optional*): Directions that V must avoid.
        name (`str`): Layer to name in errors.

    Returns:
        `tuple` of U `(d_out, r)`, σ `(r,)` in descending order and V `(d_in, r)`.

    Raises:
        ValueError: if the gradient is all zero or not finite, or if `rank` orthonormal directions do not exist.
    """
    gradient = check_gradient(gradient, name)
    d_out, d_in = gradient.shape
    basis = gradient.new_zeros(d_in, 0) if basis is None else basis.to(gradient)
    check_feasible(d_out, rank, name=name)
    check_feasible(d_in, rank, basis.shape[1], name=name)
    with full_precision():
        residual = outside(gradient, basis)  # R, (d_out, d_in)
        left, sigma, v = principal_triplets(residual, rank)
        # Right singular vectors without energy are arbitrary and may lie inside the basis: any free direction replaces
        # them. Those with energy avoid the basis up to rounding.
        energies = sigma.double().square()
        used = int((energies > noise_energy(gradient, energies[0].item())).sum())
        v = v[:, :used]
        if used < rank:
            v = torch.cat([v, _free_directions(torch.cat([basis, v], dim=1), rank - used)], dim=1)
        v = orthonormalize_against(v, basis)
    return left.contiguous(), sigma, v.contiguous()


def principal_weight_directions(weight: torch.Tensor, threshold: float, *, name: str = "weight") -> torch.Tensor:
    """
    The principal input directions of a pre-trained weight, KeepLoRA's basis before the first task.

    Keeps p = max(#{k : Σ_{i≤k} σᵢ² / ‖W‖² < threshold}, 1) right singular vectors: by the released rule one direction
    *fewer* than [`extend_basis`] would take.

    Args:
        weight (`torch.Tensor` of shape `(d_out, d_in)`): The weight.
        threshold (`float`): Share of the energy, in (0, 1].
        name (`str`): Layer to name in errors.

    Returns:
        `torch.Tensor` of shape `(d_in, p)` with orthonormal columns.

    Raises:
        ValueError: if the weight is all zero or not finite.
    """
    weight = check_gradient(weight, name)
    total = _energy(weight)
    with full_precision():
        directions, energies = leading_directions(weight, threshold * total)
    return directions[:, : max(int((energies.cumsum(0) / total < threshold).sum()), 1)].contiguous()


def column_cap(d_in: int, rank: int, columns: int, max_fraction: float = 1.0) -> int:
    """
    How many columns a basis of `columns` may still gain: up to `max_fraction`·d_in, always leaving `rank` directions
    free.

    Example:

    >>> column_cap(d_in=64, rank=4, columns=58)  # four directions are left to the next adapter
    2
    """
    return max(min(int(max_fraction * d_in), d_in - rank) - columns, 0)


def check_gradient(gradient: torch.Tensor, name: str) -> torch.Tensor:
    """
    Returns a matrix ready for decomposition (half precision becomes float32).

    Raises:
        ValueError: if it is not a matrix, not finite or all zero; the message names the layer.
    """
    if gradient.ndim != 2:
        raise ValueError(f"{name}: expected a matrix (d_out, d_in), got shape {tuple(gradient.shape)}.")
    if not torch.isfinite(gradient).all():
        raise ValueError(
            f"{name}: not finite (inf or NaN), so it spans no subspace. Check the task's data and loss, or train in "
            "float32 or bfloat16."
        )
    if not gradient.any():
        raise ValueError(
            f"{name}: all zero, so it spans no subspace. Are all labels ignored (-100)? Is the layer used by the "
            "loss? If not, leave it out of `target_modules`."
        )
    return gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient


def _energy(matrix: torch.Tensor) -> float:
    """‖·‖², summed in float64: near the threshold the rank hangs on it."""
    return matrix.square().sum(dtype=torch.float64).item()


def _trace(matrix: torch.Tensor) -> float:
    return matrix.diagonal().sum(dtype=torch.float64).item()


def _free_directions(taken: torch.Tensor, count: int) -> torch.Tensor:
    """`count` orthonormal columns outside the span of the orthonormal columns `taken`, the same ones on every call."""
    dtype, generator = taken.dtype, torch.Generator().manual_seed(0)
    columns = torch.randn(taken.shape[0], count, generator=generator, dtype=torch.float64).to(taken.device)
    taken = taken.double()
    columns = torch.linalg.qr(restrict(columns, taken)).Q
    return orthonormalize_against(columns, taken).to(dtype)
