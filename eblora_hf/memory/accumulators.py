"""Sums over the batches of a snapshot: whole matrices, on the layer's device or the CPU, or sketches of them.

A sketch holds a matrix `d_out x d_in` or `d_in x d_in` in some columns. Sources: Tropp, Yurtsever, Udell and Cevher,
for a matrix seen once (arXiv 1609.00048) and for a positive semi-definite one (arXiv 1706.05736).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..manifold.maps import restrict
from .sketch import Sketch

_ROWS = 1024  # of a sketch that are in float64 at a time
_CHECKS = 64  # random combinations of rows that are kept out of a sketch to measure it


@dataclass(frozen=True)
class Storage:
    """
    Where and how a snapshot is summed.

    Args:
        offload (`bool`, defaults to `False`): Keep the sums in the memory of the CPU.
        sketch (`int`, *optional*): Keep sketches of that many columns instead.
    """

    offload: bool = False
    sketch: int | None = None
    _drawn: dict[tuple, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def gaussian(self, rows: int, columns: int, like: torch.Tensor, seed: int = 0) -> torch.Tensor:
        """Random numbers, the same on every process and device; one matrix for all layers of a shape."""
        key = (rows, columns, like.device, like.dtype, seed)
        if key not in self._drawn:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float32)
            self._drawn[key] = drawn.to(like.device, torch.promote_types(like.dtype, torch.float32))
        return self._drawn[key]

    def orthonormal(self, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
        """The same, made orthonormal."""
        key = (rows, columns, like.device, like.dtype)
        if key not in self._drawn:
            drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
            q = torch.linalg.qr(drawn.double()).Q
            self._drawn[key] = q.to(like.device, torch.promote_types(like.dtype, torch.float32))
        return self._drawn[key]

    def numbers(self, d_out: int, d_in: int, *, second_moment: bool) -> int:
        """Numbers in the sum of a layer, [`moment`] or [`matrix`], without random ones."""
        if second_moment:
            return d_in * (self.columns if self.sketches_moment(d_in) else d_in)
        if self.sketches_matrix(d_out, d_in):
            return (3 * self.columns + _CHECKS) * d_in + self.columns * d_out
        return d_out * d_in

    def random_numbers(self, d_out: int, d_in: int, *, second_moment: bool) -> dict[tuple, int]:
        """How many random numbers belong to it, by what layers share."""
        if second_moment:
            return {(d_in, 0): d_in * self.columns} if self.sketches_moment(d_in) else {}
        if not self.sketches_matrix(d_out, d_in):
            return {}
        return {(d_in, 0): d_in * self.columns, (d_out, 1): d_out * (3 * self.columns + _CHECKS)}

    def device(self, tensor: torch.Tensor) -> torch.device:
        return torch.device("cpu") if self.offload else tensor.device

    @property
    def columns(self) -> int:
        """Columns k of its sketches."""
        if self.sketch is None:
            raise ValueError("This storage keeps no sketches: Storage(sketch=…) says of how many columns.")
        return self.sketch

    def sketches_matrix(self, d_out: int, d_in: int) -> bool:
        """Whether a sketch is kept of matrices of that shape, small ones being no larger than their sketch."""
        return self.sketch is not None and 3 * self.sketch + _CHECKS < min(d_out, d_in)

    def sketches_moment(self, d_in: int) -> bool:
        """Whether a sketch is kept of moments of that size."""
        return self.sketch is not None and self.sketch < d_in // 2

    def matrix(self, d_out: int, d_in: int) -> "MatrixSum | MatrixSketch":
        """For a sum of matrices `(d_out, d_in)`."""
        return (MatrixSketch if self.sketches_matrix(d_out, d_in) else MatrixSum)(self, d_out, d_in)

    def moment(self, d_in: int, basis: torch.Tensor | None = None) -> "MomentSum | MomentSketch":
        """For a sum of outer products of rows `(d_in,)`; a sketch is of what lies outside a basis."""
        return MomentSketch(self, d_in, basis) if self.sketches_moment(d_in) else MomentSum(self, d_in)


class MatrixSum:
    """Σ w LᵀR in float32 or wider. The first summand's memory becomes the sum's."""

    def __init__(self, storage: Storage, d_out: int, d_in: int):
        self._storage, self._shape = storage, (d_out, d_in)
        self._sum: torch.Tensor | None = None

    def add(self, left: torch.Tensor, right: torch.Tensor, weight: float) -> None:
        """Adds `weight` times LᵀR `(d_out, d_in)` for L `(n, d_out)` and R `(n, d_in)`."""
        matrix = (left.mT @ right).to(self._storage.device(right))
        if self._sum is None:
            self._sum = matrix.mul_(weight)
        else:
            self._sum.add_(matrix, alpha=weight)

    def tensors(self, like: torch.Tensor) -> list[torch.Tensor]:
        """What is to be summed over processes, zero where this one has seen nothing."""
        if self._sum is None:
            dtype = torch.promote_types(like.dtype, torch.float32)
            self._sum = torch.zeros(self._shape, dtype=dtype, device=self._storage.device(like))
        return [self._sum]

    @property
    def empty(self) -> bool:
        return self._sum is None

    def mean(self, count: float) -> torch.Tensor:
        return _seen(self._sum).div_(count)


class MatrixSketch:
    """
    Ψ M `(3k, d_in)`, M Ω `(d_out, k)` and Φ M `(q, d_in)` of M = Σ w LᵀR, for Gaussian Ψ, Ω and Φ.

    With Q an orthonormal basis of M Ω, M ≈ Q (Ψ Q)⁺ Ψ M.
    """

    def __init__(self, storage: Storage, d_out: int, d_in: int):
        self._storage, self._k, self._shape = storage, storage.columns, (d_out, d_in)
        self._right: torch.Tensor | None = None

    def add(self, left: torch.Tensor, right: torch.Tensor, weight: float) -> None:
        """Adds `weight` times LᵀR, which is never formed."""
        totals = self.tensors(right)
        parts = ((self._psi @ left.mT) @ right, left.mT @ (right @ self._omega))
        for total, part in zip(totals, parts, strict=True):
            total.add_(part.to(total.device), alpha=weight)

    def _start(self, like: torch.Tensor) -> torch.Tensor:
        (d_out, d_in), k = self._shape, self._k
        dtype, device = torch.promote_types(like.dtype, torch.float32), self._storage.device(like)
        self._omega = self._storage.gaussian(d_in, k, like)
        self._psi = self._storage.gaussian(d_out, 3 * k + _CHECKS, like, seed=1).mT  # the last rows are Φ
        self._left = torch.zeros(d_out, k, dtype=dtype, device=device)
        return torch.zeros(3 * k + _CHECKS, d_in, dtype=dtype, device=device)

    def tensors(self, like: torch.Tensor) -> list[torch.Tensor]:
        if self._right is None:
            self._right = self._start(like)
        return [self._right, self._left]

    @property
    def empty(self) -> bool:
        return self._right is None

    def mean(self, count: float) -> Sketch:
        device = self._psi.device
        right, left = _seen(self._right).to(device).div_(count), self._left.to(device)
        seen = 3 * self._k
        q = torch.linalg.qr(left).Q
        matrix = torch.linalg.lstsq(self._psi[:seen] @ q, right[:seen]).solution  # (k, d_in)
        return Sketch(matrix, left=q, checks=right[seen:])


class MomentSum:
    """K = Σ x xᵀ in float32 or wider."""

    def __init__(self, storage: Storage, d_in: int):
        self._storage, self._d_in = storage, d_in
        self._sum: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        """Adds rows `(n, d_in)`."""
        (total,) = self.tensors(x)
        if total.device == x.device:
            total.addmm_(x.T, x)
        else:
            total.add_((x.T @ x).to(total.device))

    def tensors(self, like: torch.Tensor) -> list[torch.Tensor]:
        if self._sum is None:
            dtype = torch.promote_types(like.dtype, torch.float32)
            self._sum = torch.zeros(self._d_in, self._d_in, dtype=dtype, device=self._storage.device(like))
        return [self._sum]

    def mean(self, count: float) -> torch.Tensor:
        return _seen(self._sum).div_(count)


class MomentSketch:
    """
    K Ω `(d_in, k)` of K = Σ x xᵀ for Ω of orthonormal columns, and the trace of K.

    The Nyström approximation K Ω (Ωᵀ K Ω)⁻¹ Ωᵀ K lies below K: the energy a direction has in it is never more than it
    has in K, so that a basis chosen from it, measured against the exact trace, holds at least what it seems to hold.

    With a basis F `(d_in, p)` of earlier tasks K is that of the rows x (I - F Fᵀ), and tr(Fᵀ Σ x xᵀ F) a further sum:
    what those tasks hold already would fill the sketch.
    """

    def __init__(self, storage: Storage, d_in: int, basis: torch.Tensor | None = None):
        self._storage, self._k, self._d_in, self._basis = storage, storage.columns, d_in, basis
        self._product: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        product, traces = self.tensors(x)
        whole = x.square().sum(dtype=torch.float64)
        if self._basis is not None:
            x = restrict(x.T, self._basis.to(x)).T
        outside = x.square().sum(dtype=torch.float64)
        product.add_((x.T @ (x @ self._omega)).to(product.device))
        traces.add_(torch.stack([outside, whole - outside]).to(traces.device))

    def tensors(self, like: torch.Tensor) -> list[torch.Tensor]:
        if self._product is None:
            dtype, device = torch.promote_types(like.dtype, torch.float32), self._storage.device(like)
            self._omega = self._storage.orthonormal(self._d_in, self._k, like)
            self._product = torch.zeros(self._d_in, self._k, dtype=dtype, device=device)
            self._traces = torch.zeros(2, dtype=torch.float64, device=device)  # outside the basis, and inside
        return [self._product, self._traces]

    def mean(self, count: float) -> Sketch:
        total = _seen(self._product)
        dtype, omega = total.dtype, self._omega
        if not torch.isfinite(total).all() or not total.any():
            return Sketch(total.mT)  # for whoever takes directions of it to refuse
        # shifted by the rounding of the sums, without which the small matrix need not be positive
        shift = torch.finfo(dtype).eps * (total.norm().double() / count).item() * self._k**0.5

        def parts() -> Iterator[tuple[slice, torch.Tensor]]:
            """P = (K + shift) Ω in float64, some rows at a time: a whole copy of it would be the peak of a run."""
            for start in range(0, len(total), _ROWS):
                rows = slice(start, start + _ROWS)
                yield rows, total[rows].to(omega.device).double() / count + shift * omega[rows].double()

        small = torch.zeros(self._k, self._k, dtype=torch.float64, device=omega.device)  # Ωᵀ P
        gram = torch.zeros_like(small)  # PᵀP
        for rows, part in parts():
            small += omega[rows].double().mT @ part
            gram += part.mT @ part
        root = torch.linalg.cholesky((small + small.mT) / 2)
        # P root⁻ᵀ has the Gram matrix root⁻¹ PᵀP root⁻ᵀ, whose eigenvalues are those of the approximation of K + shift
        half = torch.linalg.solve_triangular(root, gram, upper=False)
        inner = torch.linalg.solve_triangular(root, half.mT, upper=False)
        values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
        values, vectors = values.flip(0), vectors.flip(1)
        shares = ((values - shift) / values.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0.0)
        combine = torch.linalg.solve_triangular(root.mT, vectors * shares.sqrt(), upper=True)  # (k, k)
        matrix = torch.empty(self._k, self._d_in, dtype=dtype, device=omega.device)
        for rows, part in parts():
            matrix[:, rows] = (part @ combine).mT
        outside, inside = (self._traces / count).tolist()
        return Sketch(matrix, energy=outside + inside, inside=None if self._basis is None else inside)


def _seen(total: torch.Tensor | None) -> torch.Tensor:
    if total is None:
        raise ValueError("There is no mean of nothing: no sample was added.")
    return total
