"""What may be spent on remembering a task: memory while it is summed up, and columns of the bases on disk."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .accumulators import Storage
from .basis import BasisExtension

_FREE = 512 * 2**20  # bytes of sums that no training notices
SHARE_OF_WEIGHTS = 0.25  # of the adapted weights in 16 bits that sums may take beyond that
_RANKS_SKETCHED = 4  # directions in the sketch of a gradient, for each that a task starts from
_DIRECTIONS = 2  # of a curvature that are kept on either side, for each of the adapter's rank
_DIRECTIONS_SKETCHED = 2  # in the sketch of its outputs, for each of these
_COLUMNS_SKETCHED = 2  # in that of a moment, for each column that a basis may gain


@dataclass(frozen=True)
class LayerShape:
    """
    The shape of an adapted layer.

    Args:
        d_out (`int`), d_in (`int`): Of the weight.
        rank (`int`): r of its adapter.
    """

    d_out: int
    d_in: int
    rank: int

    @property
    def adapter(self) -> int:
        """Numbers in the adapter."""
        return self.rank * (self.d_in + self.d_out)


def choose_storage(shapes: list[LayerShape], *, second_moment: bool, budget: float | None) -> Storage:
    """
    How the sums of a snapshot are kept by default, by the shapes alone: whole where they are small, else as sketches
    that take [`SHARE_OF_WEIGHTS`] of the adapted weights in 16 bits at most, or in the memory of the CPU where no
    sketch of use is as small.

    Args:
        shapes (`list[LayerShape]`): Those of the adapted layers.
        second_moment (`bool`): Whether the sums are moments `(d_in, d_in)`, or gradients `(d_out, d_in)`.
        budget (`float`, *optional*): `basis_budget`.
    """
    whole = sum(4 * shape.d_in * (shape.d_in if second_moment else shape.d_out) for shape in shapes)
    allowed = int(SHARE_OF_WEIGHTS * sum(2 * shape.d_in * shape.d_out for shape in shapes))
    if whole <= max(_FREE, allowed):
        return Storage()
    if second_moment:
        wanted = _COLUMNS_SKETCHED * _mean_columns(shapes, budget)
        enough, size = 0, _largest(shapes, allowed, wanted)
    else:
        ranks = max(shape.rank for shape in shapes)
        enough, size = 2 * ranks, _largest(shapes, allowed, _RANKS_SKETCHED * ranks, second_moment=False)
    return Storage(sketch=size) if size > enough else Storage(offload=True)


def bytes_of_sums(shapes: list[LayerShape], storage: Storage, *, second_moment: bool) -> int:
    """Bytes that the sums of a snapshot take on the device, without what single layers take for a moment."""
    if storage.offload:
        return 0
    numbers = 0
    drawn: dict[tuple, int] = {}
    for shape in shapes:
        numbers += storage.numbers(shape.d_out, shape.d_in, second_moment=second_moment)
        drawn |= storage.random_numbers(shape.d_out, shape.d_in, second_moment=second_moment)
    return 4 * (numbers + sum(drawn.values()))


def kept_directions(rank: int) -> int:
    """How many directions of the curvature of a layer, by the rank of its adapter, are kept on either side."""
    return _DIRECTIONS * rank


def sketched_outputs(ranks: Iterable[int]) -> int:
    """Columns of the sketches on the side of the outputs of layers, by the ranks of their adapters."""
    return _DIRECTIONS_SKETCHED * kept_directions(max(ranks))


def roots_within_budget(rank: int, budget: float | None, itemsize: int) -> int:
    """
    Columns that are stored of the roots of a curvature on either side: [`kept_directions`], and a quarter of the
    budget at most.

    Args:
        rank (`int`): r of the layer's adapter.
        budget (`float`, *optional*): `basis_budget`.
        itemsize (`int`): Bytes of a number.
    """
    directions = kept_directions(rank)
    return directions if budget is None else min(directions, int(budget * rank / itemsize))


def within_budget(extensions: dict[str, BasisExtension], numbers: int) -> dict[str, BasisExtension]:
    """
    The columns of largest energy of all layers together, each measured by its share of its layer's, so that they have
    so many numbers at most.

    Args:
        extensions (`dict[str, BasisExtension]`): By layer name, each in descending order of energy. Those without
            energies are left as they are and count first.
        numbers (`int`): What the columns may have together.
    """
    free = numbers - sum(x.columns.numel() for x in extensions.values() if x.energies is None)
    chosen = {name: x for name, x in extensions.items() if x.energies is not None}
    if not chosen or sum(x.columns.numel() for x in chosen.values()) <= free:
        return extensions
    shares = torch.cat([_shares(x) for x in chosen.values()])
    costs = torch.cat([torch.full((x.columns.shape[1],), float(len(x.columns))) for x in chosen.values()])
    owner = torch.cat([torch.full((x.columns.shape[1],), index) for index, x in enumerate(chosen.values())])
    order = torch.argsort(shares / costs, descending=True, stable=True)  # energy for its bytes
    taken = order[costs[order].double().cumsum(0) <= free]
    counts = torch.bincount(owner[taken], minlength=len(chosen)).tolist()
    kept = {name: _first(x, count) for (name, x), count in zip(chosen.items(), counts, strict=True)}
    return {name: kept.get(name, x) for name, x in extensions.items()}


def _shares(extension: BasisExtension) -> torch.Tensor:
    """The share of its layer's energy of each column."""
    before = torch.tensor([extension.inside], dtype=torch.float64)
    return before[:0] if extension.energies is None else torch.diff(extension.energies.double(), prepend=before)


def _first(extension: BasisExtension, count: int) -> BasisExtension:
    """Its first columns."""
    if count == extension.columns.shape[1]:
        return extension
    energies = extension.energies[:count] if extension.energies is not None else None
    captured = min(float(energies[-1]), extension.captured) if energies is not None and count else extension.inside
    beyond = extension.beyond
    if beyond is not None:
        roots = _shares(extension)[count:].clamp_min(0.0).sqrt().to(extension.columns)
        wanted = beyond.shape[1] if extension.outputs is None else extension.outputs.shape[1]
        beyond = torch.cat([extension.columns[:, count:] * roots, beyond], dim=1)[:, :wanted].contiguous()
    return dataclasses.replace(
        extension,
        columns=extension.columns[:, :count].contiguous(),
        captured=captured,
        capped=True,
        energies=energies,
        beyond=beyond,
    )


def _mean_columns(shapes: list[LayerShape], budget: float | None) -> int:
    """Columns that a basis may gain on average; without a budget as many as may be sketched."""
    inputs = sum(shape.d_in for shape in shapes)
    if budget is None:
        return inputs
    return math.ceil(budget * 2 * sum(shape.adapter for shape in shapes) / inputs)  # float32 over 16 bits


def _largest(shapes: list[LayerShape], allowed: int, wanted: int, *, second_moment: bool = True) -> int:
    """The largest number of columns, `wanted` at most, of sketches that take no more than is allowed."""
    low, high = 0, wanted
    while low < high:
        middle = (low + high + 1) // 2
        fits = bytes_of_sums(shapes, Storage(sketch=middle), second_moment=second_moment) <= allowed
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
