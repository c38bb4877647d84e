"""Bases and principal directions from a sketch of a matrix, which says what it may have missed."""

import dataclasses
from dataclasses import dataclass

import torch

from ..manifold.maps import restrict
from .basis import BasisExtension, extend_basis, principal_directions

_CONFIDENCE = 2.0  # standard deviations of an estimated share by which a basis has to do better than asked


@dataclass(frozen=True)
class Sketch:
    """
    What a sketch has kept of a matrix M `(m, d_in)`.

    Args:
        matrix (`torch.Tensor` of shape `(k, d_in)`): X with M ≈ `left` X; or, for a second moment K, XᵀX below K.
        left (`torch.Tensor` of shape `(m, k)`, *optional*): Orthonormal columns.
        energy (`float`, *optional*): The trace of K, which is known exactly.
        inside (`float`, *optional*): How much of it lies in the basis of earlier tasks, if `matrix` is of the rest.
        checks (`torch.Tensor` of shape `(q, d_in)`, *optional*): Random combinations of the rows of M that the sketch
            has not seen: what share of them a basis holds estimates what share of M it holds.
    """

    matrix: torch.Tensor
    left: torch.Tensor | None = None
    energy: float | None = None
    inside: float | None = None
    checks: torch.Tensor | None = None


def extend_basis_from_sketch(
    sketch: Sketch,
    basis: torch.Tensor | None = None,
    *,
    threshold: float = 0.99,
    max_columns: int | None = None,
    may_miss: bool = False,
    beyond: int = 0,
    name: str = "gradient",
) -> BasisExtension:
    """
    [`extend_basis`] for a matrix of which only a sketch is there. It takes some more columns.

    Of a second moment `captured` is a lower bound, because a sketch of one lies below it. Of a mean gradient it is
    estimated from the rows kept out of the sketch, less two standard deviations.

    Args:
        sketch ([`Sketch`]): Of a mean gradient or a second moment.
        basis, threshold, max_columns, beyond, name: As for [`extend_basis`].
        may_miss (`bool`, defaults to `False`): Whether the reach of the sketch is a cap like another.

    Returns:
        [`BasisExtension`].

    Raises:
        ValueError: if no basis from the sketch holds the threshold, and it is not the cap that stops it.
    """
    if sketch.checks is None:
        extension = extend_basis(
            sketch.matrix,
            basis,
            threshold=threshold,
            max_columns=max_columns,
            total=sketch.energy,
            inside=sketch.inside,
            beyond=beyond,
            name=name,
        )
    else:
        aim = threshold
        while True:
            found = extend_basis(
                sketch.matrix, basis, threshold=aim, max_columns=max_columns, beyond=beyond, name=name
            )
            captured = _captured(sketch.checks, basis, found.columns)
            extension = dataclasses.replace(found, captured=captured)
            aim = 1.0 - (1.0 - aim) / 2.0
            if extension.captured >= threshold or extension.capped or 1.0 - aim <= 1e-5:
                break
    if extension.captured < threshold and may_miss:
        return dataclasses.replace(extension, capped=True)
    if extension.captured < threshold and not extension.capped:
        raise ValueError(
            f"{name}: a sketch of {len(sketch.matrix)} directions holds {extension.captured:.2%} of the energy for "
            f"certain, less than the {threshold:.2%} asked for. Raise `snapshot_sketch`, lower `energy_threshold`, or "
            "take the snapshot without a sketch (`snapshot_offload=True` keeps it in the memory of the CPU)."
        )
    return extension


def _captured(checks: torch.Tensor, basis: torch.Tensor | None, columns: torch.Tensor) -> float:
    """The share of a matrix's energy that a basis holds, estimated from below from random combinations of its rows."""
    columns = columns.to(checks)
    whole = columns if basis is None else torch.cat([basis.to(checks), columns], dim=1)
    missing = restrict(checks.mT, whole).double().square().sum() / checks.double().square().sum()
    return 1.0 - missing.item() * (1.0 + _CONFIDENCE * (2.0 / len(checks)) ** 0.5)


def principal_directions_from_sketch(
    sketch: Sketch, rank: int, basis: torch.Tensor | None = None, *, name: str = "gradient"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    [`principal_directions`] of the matrix that a sketch stands for.

    Raises:
        ValueError: as [`principal_directions`], or if the sketch has fewer directions than `rank`.
    """
    if len(sketch.matrix) < rank:
        raise ValueError(
            f"{name}: a sketch of {len(sketch.matrix)} directions has no {rank} principal ones. Raise "
            "`snapshot_sketch` to a multiple of the LoRA rank."
        )
    u, sigma, v = principal_directions(sketch.matrix, rank, basis, name=name)
    return u if sketch.left is None else sketch.left @ u, sigma, v
