"""The feature snapshot: the input directions that a task uses in each adapted layer, an alternative to gradients."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .layers import AdaptedLayer


def feature_matrices(
    model: nn.Module,
    layers: list[AdaptedLayer],
    batches: Iterable[tuple[dict, int]],
    forward: Callable[[nn.Module, dict], Any],
) -> dict[str, torch.Tensor]:
    """
    What the inputs x of each layer span, as a matrix X with Xᵀ X = Σ x xᵀ / n over all tokens (GPM, arXiv 2103.09762).

    The second moment is summed and a root of it taken at the end: X has the singular values and the right
    singular vectors of the matrix that stacks all n inputs, in d_in rows instead of n. With `torch.distributed`
    running, every process passes its own batches and all get the moments over all. Where a batch has an
    `attention_mask` of the layer's batch and length, padding does not count.

    Args:
        model (`nn.Module`): The model, unwrapped.
        layers (`list[AdaptedLayer]`): The layers whose inputs are observed.
        batches (iterable of `(inputs, n)`): Batches; n is not used, every token counts alike.
        forward (`Callable`): Runs the model on the inputs.

    Returns:
        `dict[str, torch.Tensor]`: Per layer name, X of shape `(d_in, d_in)` in float32 (float64 for a float64 weight).

    Raises:
        ValueError: if there is no batch, or a layer received no input; the message names the layer.
    """
    moments = {
        layer.name: torch.zeros(
            layer.d_in,
            layer.d_in,
            dtype=torch.promote_types(layer.weight.dtype, torch.float32),
            device=layer.weight.device,
        )
        for layer in layers
    }
    counts = dict.fromkeys(moments, 0)
    mask: torch.Tensor | None = None

    def observe(name: str) -> Callable:
        def hook(module: nn.Module, arguments: tuple) -> None:
            x = arguments[0].detach()  # (..., d_in)
            if mask is not None and x.shape[:-1] == mask.shape:
                x = x[mask]
            x = x.reshape(-1, x.shape[-1]).to(moments[name].dtype)  # (tokens, d_in)
            moments[name].addmm_(x.T, x)
            counts[name] += len(x)

        return hook

    # a decoder's own mask may have the shape of the encoder's by accident, so that only one-stream models are masked
    masked = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    handles = [layer.module.register_forward_pre_hook(observe(layer.name)) for layer in layers]
    try:
        with torch.no_grad():
            for inputs, _ in batches:
                mask = inputs["attention_mask"].bool() if masked and "attention_mask" in inputs else None
                forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for layer in layers:
            count = torch.tensor(counts[layer.name], device=layer.weight.device)
            for summand in (moments[layer.name], count):
                torch.distributed.all_reduce(summand)
            counts[layer.name] = int(count)
    for name, count in counts.items():
        if count == 0:
            raise ValueError(
                f"{name}: the snapshot's batches send no input through this layer, so it cannot be protected. Is the "
                "training set empty? If not, leave the layer out of `target_modules`."
            )
    return {name: _root(moment / counts[name]) for name, moment in moments.items()}


def _root(moment: torch.Tensor) -> torch.Tensor:
    """A root diag(√λ) Qᵀ of a positive semi-definite matrix Q diag(λ) Qᵀ."""
    eigenvalues, vectors = torch.linalg.eigh(moment.double())
    return (eigenvalues.clamp_min(0.0).sqrt().unsqueeze(-1) * vectors.T).to(moment.dtype)
