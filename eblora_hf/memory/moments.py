"""Second moments on the input side of each adapted layer: of its inputs, or of the gradients of single tokens.

Either is an alternative to the mean gradient, in which the gradients of samples that are fitted well cancel out.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..adapters.layers import AdaptedLayer
from .accumulators import Storage
from .gradients import all_reduce, observed_gradients
from .sketch import Sketch

Batches = Iterable[tuple[dict, int]]
_ON_DEVICE = Storage()


def feature_moments(
    model: nn.Module,
    layers: list[AdaptedLayer],
    batches: Batches,
    forward: Callable[[nn.Module, dict], Any],
    storage: Storage = _ON_DEVICE,
) -> dict[str, torch.Tensor | Sketch]:
    """
    The second moment of the inputs x of each layer, K = Σ x xᵀ / n over all tokens (GPM, arXiv 2103.09762).

    Its eigenvectors and eigenvalues are the right singular vectors and squared singular values of the matrix that
    stacks all inputs. With `torch.distributed` running, every process passes its own batches and all get the moments
    over all. Where a batch has an `attention_mask` of the layer's batch and length, padding does not count.

    Args:
        model (`nn.Module`): The model, unwrapped.
        layers (`list[AdaptedLayer]`): The layers whose inputs are observed.
        batches (iterable of `(inputs, n)`): Batches; every token counts alike, or for nothing where n is 0.
        forward (`Callable`): Runs the model on the inputs.
        storage ([`Storage`], *optional*): Where the sums are kept, and whether they are sketches.

    Returns:
        `dict[str, torch.Tensor]`: Per layer name, K of shape `(d_in, d_in)` in float32 (float64 for a float64
            weight); or a [`Sketch`] of it.

    Raises:
        ValueError: if there is no batch, or a layer received no input; the message names the layer.
    """
    moments = _Moments(layers, storage)
    # a decoder's own mask may have the shape of the encoder's by accident, so that only one-stream models are masked
    masked = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    mask: torch.Tensor | None = None
    count = 0

    def observe(layer: AdaptedLayer) -> Callable:
        def hook(module: nn.Module, arguments: tuple) -> None:
            x = arguments[0]  # (..., d_in)
            if count:
                moments.add(layer, x[mask] if mask is not None and x.shape[:-1] == mask.shape else x)

        return hook

    handles = [layer.module.register_forward_pre_hook(observe(layer)) for layer in layers]
    try:
        with torch.no_grad():
            for inputs, samples in batches:
                count = samples
                mask = inputs["attention_mask"].bool() if masked and "attention_mask" in inputs else None
                forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return moments.means()


def token_gradient_moments(
    model: nn.Module,
    layers: list[AdaptedLayer],
    batches: Batches,
    loss: Callable[[nn.Module, dict], torch.Tensor],
    storage: Storage = _ON_DEVICE,
) -> dict[str, torch.Tensor | Sketch]:
    """
    The second moment of the gradients of single tokens on the input side, K = Σ G_tᵀ G_t / n over all tokens t.

    A token with input x and δ = dL/dy at the layer's output has the gradient G_t = δ xᵀ, so G_tᵀ G_t = ‖δ‖² x xᵀ: the
    inputs weighted by how strongly the loss depends on the layer's output there, the input side of the empirical
    Fisher information. Weights need no gradient, so the extra memory is one `(d_in, d_in)` matrix a layer.

    Args, return value and errors are those of [`feature_moments`], but for `loss`, which maps model and inputs to the
    scalar mean loss of the batch. The gradients are those of the sum over its n samples.
    """
    moments = _Moments(layers, storage)
    samples = 0

    def add(layer: AdaptedLayer, x: torch.Tensor, delta: torch.Tensor) -> None:
        if samples == 0:
            return
        weights = (delta.to(layer.sum_dtype) * samples).norm(dim=-1, keepdim=True)  # ‖δ‖, (..., 1)
        moments.add(layer, x * weights)

    with observed_gradients(model, layers, add):
        for inputs, count in batches:
            samples = count
            loss(model, inputs).backward()
    return moments.means()


class _Moments:
    """Sums of x xᵀ by layer, in float32 or wider."""

    def __init__(self, layers: list[AdaptedLayer], storage: Storage):
        self._layers = layers
        self._sums = {layer.name: storage.moment(layer.d_in) for layer in layers}
        self._counts = dict.fromkeys(self._sums, 0)

    def add(self, layer: AdaptedLayer, x: torch.Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).to(layer.sum_dtype)  # (tokens, d_in)
        self._sums[layer.name].add(x)
        self._counts[layer.name] += len(x)

    def means(self) -> dict[str, torch.Tensor | Sketch]:
        """By layer name the mean over all processes."""
        means, distributed = {}, torch.distributed.is_available() and torch.distributed.is_initialized()
        for layer in self._layers:
            count = torch.tensor(self._counts[layer.name], device=layer.weight.device)
            if distributed:
                for summand in (count, *self._sums[layer.name].tensors(like=layer.weight)):
                    all_reduce(summand, layer.weight.device)
            if count == 0:
                raise ValueError(
                    f"{layer.name}: the snapshot's batches say nothing of this layer, so it cannot be protected. Is "
                    "the training set empty? If not, leave the layer out of `target_modules`."
                )
            means[layer.name] = self._sums.pop(layer.name).mean(count.item())
        return means
