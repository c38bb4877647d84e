"""The curvature of a task's loss in each adapted layer, by the Kronecker factors of K-FAC (arXiv 1503.05671).

It comes from the gradients of single tokens, like the bases: their moments on the side of the inputs, and with them
those on the side of the outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..adapters.layers import AdaptedLayer
from .accumulators import Storage
from .budget import sketched_outputs
from .gradients import observed_gradients
from .moments import Batches, Moments, squared_norms
from .sketch import Sketch

_ON_DEVICE = Storage()


@dataclass(frozen=True)
class CurvatureMoments:
    """
    Both sides of the gradients G = δ xᵀ of single tokens in a layer, from which K-FAC takes its curvature.

    Args:
        inputs (`torch.Tensor` of shape `(d_in, d_in)` or [`Sketch`]): Σ ‖δ‖² x xᵀ / m over all tokens, for the
            gradients of a sum over m items of the loss.
        outputs (`torch.Tensor` of shape `(d_out, d_out)` or [`Sketch`]): Σ δ δᵀ / m.
    """

    inputs: torch.Tensor | Sketch
    outputs: torch.Tensor | Sketch


def curvature_moments(
    model: nn.Module,
    layers: list[AdaptedLayer],
    batches: Batches,
    loss: Callable[[nn.Module, dict], torch.Tensor],
    storage: Storage = _ON_DEVICE,
    items: Callable[[dict], float] | None = None,
) -> dict[str, CurvatureMoments]:
    """
    [`token_gradient_moments`], and with them the moments of the gradients δ at the outputs of each layer.

    Args:
        items (`Callable`, *optional*): By how many items the loss of a batch is divided; its samples by default.
            The other arguments are those of [`token_gradient_moments`].

    Returns:
        `dict[str, CurvatureMoments]`: By layer name.
    """
    inputs, outputs = Moments(layers, storage), output_moments(layers, storage)
    scale, total = 0.0, torch.zeros((), dtype=torch.float64)

    def add(layer: AdaptedLayer, x: torch.Tensor, delta: torch.Tensor) -> None:
        if scale:
            inputs.add(layer, x, squared_norms(delta, scale))
            outputs.add(layer, delta.to(layer.sum_dtype) * scale)

    with observed_gradients(model, layers, add):
        for batch, count in batches:
            scale = float(count and (items(batch) if items else count))
            total += scale
            loss(model, batch).backward()
    return joined_moments(inputs, outputs, total)


def output_moments(layers: list[AdaptedLayer], storage: Storage) -> Moments:
    """For sums over δ δᵀ, of which some directions will be kept."""
    columns = sketched_outputs(layer.rank for layer in layers)
    return Moments(layers, Storage(storage.offload, columns), side="d_out")


def joined_moments(inputs: Moments, outputs: Moments, items: torch.Tensor) -> dict[str, CurvatureMoments]:
    """Both sides' means over the items of all processes."""
    items = items.to(inputs.device, torch.float32, copy=True)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(items)
    left, right = outputs.means(items.item()), inputs.means(items.item())
    return {name: CurvatureMoments(right[name], left[name]) for name in right}


def output_root(moments: CurvatureMoments, directions: int) -> torch.Tensor:
    """
    A root Y `(d_out, q)` of the output side of a curvature: its leading directions.

    Both moments have the scale of the gradients; K-FAC's factor of the inputs has not, being Σ w x xᵀ / Σ w. That of
    [`BasisExtension.beyond`] has the trace 1, so that Y Yᵀ is the output side times tr(Σ w x xᵀ) / Σ w.
    """
    y, size = moments.outputs, _trace(moments.inputs) / _trace(moments.outputs)
    if isinstance(y, Sketch):
        left, sigma, _ = torch.linalg.svd(y.matrix.mT, full_matrices=False)
        root = left[:, :directions] * sigma[:directions]
    else:
        energies, vectors = torch.linalg.eigh(y)  # ascending
        root = (vectors * energies.clamp_min(0.0).sqrt()).flip(1)[:, :directions]
    return root * size**0.5


def _trace(moment: torch.Tensor | Sketch) -> float:
    if not isinstance(moment, Sketch):
        return moment.diagonal().sum(dtype=torch.float64).item()
    return moment.matrix.square().sum(dtype=torch.float64).item() if moment.energy is None else moment.energy
