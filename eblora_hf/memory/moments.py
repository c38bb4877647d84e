"""Second moments on the input side of each adapted layer: of its inputs, or of the gradients of single tokens.

Either is an alternative to the mean gradient, in which the gradients of samples that are fitted well cancel out.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

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
    moments = Moments(layers, storage)
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
    moments = Moments(layers, storage)
    samples = 0

    def add(layer: AdaptedLayer, x: torch.Tensor, delta: torch.Tensor) -> None:
        if samples:
            moments.add(layer, x, squared_norms(delta, samples))

    with observed_gradients(model, layers, add):
        for inputs, count in batches:
            samples = count
            loss(model, inputs).backward()
    return moments.means()


def squared_norms(delta: torch.Tensor, scale: float | torch.Tensor = 1.0) -> torch.Tensor:
    """‖scale·δ‖² of each row of δ `(..., d)`, in float32 or wider, `(...)`."""
    dtype = torch.promote_types(delta.dtype, torch.float32)
    return (torch.linalg.vector_norm(delta, dim=-1, dtype=dtype) * scale).square()


class Moments:
    """
    Sums of w x xᵀ by layer, in float32 or wider.

    Args:
        layers (`list[AdaptedLayer]`): The layers.
        storage ([`Storage`]): Where the sums are kept, and whether they are sketches.
        bases (`dict[str, torch.Tensor]`, *optional*): By layer name orthonormal columns `(d_in, p)`. A sketch then
            keeps what lies outside them, and of what lies inside no more than its energy.
        side (`str`, defaults to `"d_in"`): Or `"d_out"`: which size the rows have.
    """

    def __init__(
        self,
        layers: list[AdaptedLayer],
        storage: Storage,
        bases: dict[str, torch.Tensor] | None = None,
        side: Literal["d_in", "d_out"] = "d_in",
    ):
        self._layers, bases = layers, bases or {}
        self._sums = {layer.name: storage.moment(getattr(layer, side), bases.get(layer.name)) for layer in layers}
        self._counts = dict.fromkeys(self._sums, 0)

    def add(
        self, layer: AdaptedLayer, x: torch.Tensor, weights: torch.Tensor | None = None, at_most: int | None = None
    ) -> None:
        """
        Adds the tokens of a batch.

        Args:
            layer (`AdaptedLayer`): One of the layers.
            x (`torch.Tensor` of shape `(..., d_in)`): Their inputs.
            weights (`torch.Tensor` of shape `(...)`, *optional*): w of each, 1 by default.
            at_most (`int`, *optional*): If there are more, so many stand for all of them, see [`representatives`].
        """
        x = x.detach().reshape(-1, x.shape[-1])  # (tokens, d_in)
        self._counts[layer.name] += len(x)
        if weights is not None:
            x = representatives(x, weights.detach().reshape(-1), at_most, layer.sum_dtype)
        self._sums[layer.name].add(x.to(layer.sum_dtype))

    def missing(self) -> list[str]:
        """The layers of which nothing was added on any process."""
        return [name for name, count in self._all_counts().items() if count == 0]

    def _all_counts(self) -> dict[str, int]:
        """Tokens by layer name, over all processes."""
        counts = torch.tensor(list(self._counts.values()), device=self.device)
        if _distributed():
            torch.distributed.all_reduce(counts)
        return dict(zip(self._counts, counts.tolist(), strict=True))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The sums of this process so far, to go on from."""
        state = {f"{name}.tokens": torch.tensor(count) for name, count in self._counts.items()}
        for layer in self._layers:
            for number, total in enumerate(self._sums[layer.name].tensors(like=layer.weight)):
                state[f"{layer.name}.{number}"] = total
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Adds sums that [`state_dict`] has given."""
        for layer in self._layers:
            self._counts[layer.name] += int(state[f"{layer.name}.tokens"])
            for number, total in enumerate(self._sums[layer.name].tensors(like=layer.weight)):
                total.add_(state[f"{layer.name}.{number}"].to(total))

    @property
    def device(self) -> torch.device:
        """Of the layers."""
        return self._layers[0].weight.device

    def means(self, items: float | None = None) -> dict[str, torch.Tensor | Sketch]:
        """By layer name the mean over all tokens of all processes, or over so many `items`; the sums are let go."""
        means, counts = {}, self._all_counts()
        for layer in self._layers:
            if counts[layer.name] == 0:
                raise ValueError(
                    f"{layer.name}: the snapshot's batches say nothing of this layer, so it cannot be protected. Is "
                    "the training set empty? If not, leave the layer out of `target_modules`."
                )
            total = self._sums.pop(layer.name)
            for summand in total.tensors(like=layer.weight) if _distributed() else ():
                all_reduce(summand, layer.weight.device)
            means[layer.name] = total.mean(counts[layer.name] if items is None else items)
        return means


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def representatives(x: torch.Tensor, weights: torch.Tensor, count: int | None, dtype: torch.dtype) -> torch.Tensor:
    """
    Rows y `(n, d)` with Σ y yᵀ ≈ Σ w x xᵀ, of the same trace: all rows √w x, or `count` for all of them.

    Those are drawn in proportion to their energies w‖x‖², at equal distances along the sum of these (systematic
    sampling), and get the same energy each. Nothing in it is random.

    Args:
        x (`torch.Tensor` of shape `(tokens, d)`): Rows.
        weights (`torch.Tensor` of shape `(tokens,)`): w.
        count (`int`, *optional*): How many are enough.
        dtype (`torch.dtype`): Of the result.
    """
    if count is None or count >= len(x):
        return x.to(dtype) * weights.sqrt().unsqueeze(-1)
    cumulative = (squared_norms(x) * weights).double().cumsum(0)
    energy = cumulative[-1] / count
    positions = energy * (torch.arange(count, device=x.device, dtype=torch.float64) + 0.5)
    rows = x[torch.searchsorted(cumulative, positions).clamp_(max=len(x) - 1)].to(dtype)
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows * (energy.sqrt().to(dtype) / lengths.clamp_min(torch.finfo(dtype).tiny))
