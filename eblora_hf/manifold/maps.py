"""Geometry of the Stiefel manifold St(d, r) = {X of shape (d, r) : XᵀX = I}, restricted to the complement of a basis.

All functions are batched over leading dimensions and work in the dtype they are given. `x` is a tall factor `(..., d,
r)` and `basis` an orthonormal basis F `(..., d, p)` of the directions to avoid, or `None`. Sources: EBLoRA (arXiv
2602.00722) and, for the constraint through optimizer hooks, StelLA.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def restrict(z: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    """
    Removes from the columns of `z` what lies in the span of `basis`: P_F Z = Z - F (Fᵀ Z).

    Args:
        z (`torch.Tensor` of shape `(..., d, r)`): Any tall matrices.
        basis (`torch.Tensor` of shape `(..., d, p)`, *optional*): Orthonormal columns; `None` leaves `z` as it is.

    Returns:
        `torch.Tensor` of shape `(..., d, r)`.

    Example:

    >>> basis = torch.tensor([[1.0], [0.0], [0.0]])  # F holds the first direction
    >>> restrict(torch.tensor([[5.0], [2.0], [1.0]]), basis).flatten().tolist()
    [0.0, 2.0, 1.0]
    """
    if basis is None:
        return z
    return z - basis @ (basis.mT @ z)


def canonical_tangent(x: torch.Tensor, z: torch.Tensor, basis: torch.Tensor | None = None) -> torch.Tensor:
    """
    The released tangent map K_X(Z; F) = P_F Z - X (P_F Z)ᵀ X (gradient under the canonical metric).

    It counts the rotation inside the span of X twice, hence is not idempotent; see [`orthogonal_tangent`].

    Args:
        x (`torch.Tensor` of shape `(..., d, r)`): Orthonormal factors.
        z (`torch.Tensor` of shape `(..., d, r)`): Euclidean gradients or increments.
        basis (`torch.Tensor` of shape `(..., d, p)`, *optional*): Directions to avoid.

    Returns:
        `torch.Tensor` of shape `(..., d, r)`.
    """
    z = restrict(z, basis)
    return z - x @ in_span(x.mT @ z, "canonical")


def orthogonal_tangent(x: torch.Tensor, z: torch.Tensor, basis: torch.Tensor | None = None) -> torch.Tensor:
    """
    The orthogonal projection on the tangent space, P_F Z - X sym(Xᵀ P_F Z), as StelLA uses it.

    Args and return value are those of [`canonical_tangent`].

    Example:

    >>> x, z = torch.eye(3, 1), torch.tensor([[5.0], [2.0], [1.0]])
    >>> orthogonal_tangent(x, z).flatten().tolist()  # what lies along X itself is no tangent
    [0.0, 2.0, 1.0]
    """
    z = restrict(z, basis)
    return z - x @ in_span(x.mT @ z, "orthogonal")


def in_span(inner: torch.Tensor, tangent: str) -> torch.Tensor:
    """What the `"canonical"` or `"orthogonal"` map takes off inside the span of X, given XᵀZ `(..., r, r)`."""
    return inner.mT if tangent == "canonical" else (inner + inner.mT) / 2


def polar_factor(y: torch.Tensor) -> torch.Tensor:
    """
    The orthonormal matrix nearest to `y` (its polar factor), Y (YᵀY)^(-1/2), without a singular value decomposition.

    After a tangent step YᵀY = I + δᵀδ, so the Gram matrix never comes near singular. It is small, and decomposing it
    in float64 leaves the result at the rounding floor of `y`'s own dtype.

    Args:
        y (`torch.Tensor` of shape `(..., d, r)`): Matrices of full column rank. A non-finite matrix gives NaN.

    Returns:
        `torch.Tensor` of shape `(..., d, r)` with orthonormal columns.

    Example:

    >>> x = polar_factor(torch.tensor([[3.0, 0.0], [0.0, 0.5], [0.0, 0.0]]))
    >>> torch.allclose(x, torch.eye(3, 2))
    True
    """
    gram = (y.mT @ y).double()  # (..., r, r)
    finite = torch.isfinite(gram).all(dim=(-2, -1), keepdim=True)
    # eigh refuses non-finite input, which a diverged model is entitled to: such a matrix goes around it and stays NaN
    identity = torch.eye(y.shape[-1], dtype=gram.dtype, device=y.device)
    eigenvalues, vectors = torch.linalg.eigh(torch.where(finite, gram, identity))
    inverse_root = (vectors * eigenvalues.rsqrt().unsqueeze(-2)) @ vectors.mT
    x = y @ torch.where(finite, inverse_root, torch.nan).to(y.dtype)
    return x @ (1.5 * identity.to(y.dtype) - 0.5 * (x.mT @ x))


def polar_retraction(x: torch.Tensor, delta: torch.Tensor, basis: torch.Tensor | None = None) -> torch.Tensor:
    """
    Moves from `x` along the tangent `delta` and comes back to the manifold: the polar factor of P_F (X + δ).

    Args:
        x (`torch.Tensor` of shape `(..., d, r)`): Orthonormal factors.
        delta (`torch.Tensor` of shape `(..., d, r)`): Tangent vectors at `x`.
        basis (`torch.Tensor` of shape `(..., d, p)`, *optional*): Directions to avoid; the result is orthogonal to
            them even where `x` was not.

    Returns:
        `torch.Tensor` of shape `(..., d, r)`.
    """
    return polar_factor(restrict(x + delta, basis))


def check_feasible(d: int, r: int, p: int = 0, name: str = "factor") -> None:
    """
    Raises if no `r` orthonormal directions exist in R^d outside a subspace of dimension `p`.

    Raises:
        ValueError: if `p + r > d`.
    """
    if p + r > d:
        raise ValueError(
            f"{name}: no {r} orthonormal directions are left in R^{d} outside a basis of {p} columns "
            f"(p + r = {p + r} > d = {d}). Lower the LoRA rank `r`, the `energy_threshold` or `max_basis_fraction`."
        )


def check_factor(
    x: torch.Tensor, basis: torch.Tensor | None = None, *, atol: float = 1e-5, explain: bool = False
) -> bool | tuple[bool, str | None]:
    """
    Checks that `x` is orthonormal and orthogonal to `basis`.

    Args:
        x (`torch.Tensor` of shape `(..., d, r)`): Factors to check.
        basis (`torch.Tensor` of shape `(..., d, p)`, *optional*): Directions that `x` must avoid.
        atol (`float`, defaults to 1e-5): The largest deviation of an entry of XᵀX - I and of FᵀX that passes.
        explain (`bool`, defaults to `False`): Also return what is violated and by how much.

    Returns:
        `bool`, or `(bool, str | None)` with `explain=True`.
    """
    orthonormality, restriction = factor_deviation(x, basis)
    problems = []
    if not orthonormality <= atol:  # written so that NaN fails
        problems.append(f"columns are not orthonormal: max |XᵀX - I| = {orthonormality:.3e} > {atol:.1e}")
    if not restriction <= atol:
        problems.append(f"columns are not orthogonal to the basis: max |FᵀX| = {restriction:.3e} > {atol:.1e}")
    return (not problems, "; ".join(problems) or None) if explain else not problems


def factor_deviation(x: torch.Tensor, basis: torch.Tensor | None = None) -> tuple[float, float]:
    """Returns `(max |XᵀX - I|, max |FᵀX|)` as floats, computed in float64."""
    x = x.double()
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    orthonormality = (x.mT @ x - identity).abs().max().item()
    if basis is None or basis.shape[-1] == 0:
        return orthonormality, 0.0
    return orthonormality, (basis.double().mT @ x).abs().max().item()


def multiplies_exactly() -> bool:
    """Whether products of float32 matrices are taken in float32 at present, and not in TF32 or bf16."""
    backends = [torch.backends, *_matmul_backends()]
    return all(getattr(backend, "fp32_precision", "none") in ("ieee", "none") for backend in backends)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Runs matrix products in true float32: TF32 keeps 10 bits of mantissa, orthonormality to 1e-3 only."""
    backends = _matmul_backends()
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _matmul_backends() -> list[Any]:
    backends: Any = torch.backends  # whose types do not tell of these
    return [backends.cuda.matmul, backends.mkldnn.matmul]


@contextlib.contextmanager
def flushed_denormals(device: torch.device) -> Iterator[None]:
    """
    On a CPU, rounds denormal numbers to zero: moments of directions that are projected out decay into them, and they
    slow it several times.
    """
    already = (torch.tensor(1e-38) * 0.1).item() == 0.0
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(already)
