"""Leading directions of a large matrix by energy: exact, or by a randomised range finder where few are enough.

Sources: Halko, Martinsson and Tropp (arXiv 0909.4061) for the range finder and its power iterations.
"""

import torch

_SMALL = 256  # matrices with a side up to this are decomposed at once
_FIRST_SIZE = 64  # directions of the first attempt; each further one takes four times as many
_LARGEST_SHARE = 4  # beyond one direction in so many an exact decomposition is faster


def leading_directions(
    matrix: torch.Tensor, energy: float, *, second_moment: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Orthonormal directions v of the inputs of a matrix M in descending order of their energy, enough of them to hold
    `energy` if all together do.

    Energies are those of the returned directions themselves, to [`rounding_of`]. With exact directions they are
    squared singular values; a randomised search needs a direction more for the same sum at most.

    Args:
        matrix (`torch.Tensor` of shape `(m, n)`): M; or with `second_moment` the positive semi-definite K = MᵀM,
            `(n, n)`.
        energy (`float`): What the energies of the directions should sum to, ‖M‖² at most.

    Returns:
        `tuple` of directions `(n, k)` and energies ‖M v‖², float64 of shape `(k,)`.
    """
    if min(matrix.shape) > _SMALL:
        margin = rounding_of(matrix) * (matrix.diagonal().sum() if second_moment else matrix.square().sum()).item()
        basis, size = None, _FIRST_SIZE
        while size <= min(matrix.shape) // _LARGEST_SHARE:
            basis = _find_range(matrix, size, second_moment, start=basis)
            product = matrix @ basis  # (m, k)
            inner = (basis.mT @ product) if second_moment else product.mT @ product
            energies, vectors = torch.linalg.eigh((inner + inner.mT).double() / 2)  # ascending
            energies = energies.flip(0).clamp_min(0.0)
            if energies.sum().item() >= energy + margin:
                return basis @ vectors.flip(1).to(basis.dtype), energies
            if energies.sum().item() + 3 * size * energies[-1].item() < energy:
                break  # four times as many would not do either: each further one has at most the energy of the last
            size *= 4
    return _all_directions(matrix, second_moment)


def rounding_of(matrix: torch.Tensor) -> float:
    """By what share of a matrix's energy the sum of its directions' energies may be off."""
    return 1e-6 if min(matrix.shape) > _SMALL else 0.0


def noise_energy(matrix: torch.Tensor, largest: float, *, second_moment: bool = False) -> float:
    """
    The energy that a direction may seem to have by rounding alone.

    Args:
        matrix (`torch.Tensor`): M, or its second moment, before anything was taken off it.
        largest (`float`): The largest energy of a direction in what is left of it.
    """
    eps, side = torch.finfo(matrix.dtype).eps, max(matrix.shape)
    if second_moment:
        return 8.0 * eps * side**0.5 * matrix.norm().item()
    rounding = matrix.square().sum(dtype=torch.float64).item() * (side * eps) ** 2
    return rounding + (8.0 * eps * side**0.5 * largest if min(matrix.shape) > _SMALL else 0.0)


def principal_triplets(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The leading singular triplets u, σ, v of a matrix, with M v = σ u whatever their accuracy.

    Args:
        matrix (`torch.Tensor` of shape `(m, n)`): M.
        rank (`int`): Their number r, at most min(m, n).

    Returns:
        `tuple` of U `(m, r)`, σ `(r,)` in descending order and V `(n, r)`.
    """
    size = 2 * rank + 32
    if min(matrix.shape) <= size * _LARGEST_SHARE:
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], sigma[:rank], right[:rank].mT
    basis = _find_range(matrix, size, False, iterations=4)
    left, sigma, right = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return left[:, :rank], sigma[:rank], basis @ right[:rank].mT


def _find_range(
    matrix: torch.Tensor,
    size: int,
    second_moment: bool,
    *,
    start: torch.Tensor | None = None,
    iterations: int = 2,
) -> torch.Tensor:
    """
    Orthonormal columns `(n, size)` near the span of the leading right singular vectors, the same ones on every call.

    Each iteration multiplies by MᵀM, two are one and a half power iterations of the usual count.
    """
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(matrix.shape[1], size, generator=generator, dtype=torch.float32).to(matrix)
    if start is not None:
        columns[:, : start.shape[1]] = start
    for _ in range(iterations):
        columns = matrix @ columns if second_moment else matrix.mT @ (matrix @ columns)
        columns = torch.linalg.qr(columns).Q
    return columns


def _all_directions(matrix: torch.Tensor, second_moment: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if second_moment:
        energies, vectors = torch.linalg.eigh(matrix.double() if len(matrix) <= _SMALL else matrix)
        return vectors.flip(1).to(matrix.dtype), energies.double().flip(0).clamp_min(0.0)
    if min(matrix.shape) <= _SMALL:
        _, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        return right.mT, sigma.double().square()
    if matrix.shape[1] <= matrix.shape[0]:
        return _all_directions(matrix.mT @ matrix, second_moment=True)
    # fewer rows than columns: v = Mᵀu / σ from the eigenvectors u of M Mᵀ, as far as σ is above the rounding
    energies, left = torch.linalg.eigh(matrix @ matrix.mT)
    used = energies > energies[-1] * len(matrix) * torch.finfo(matrix.dtype).eps
    right = (matrix.mT @ left[:, used]).flip(1)  # columns of length σ
    lengths = right.norm(dim=0)
    return right / lengths, lengths.double().square()
