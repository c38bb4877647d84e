"""Second moments on the input side of each adapted layer: of its inputs, or of the gradients of single tokens.

Either is an alternative to the mean gradient, in which the gradients of samples that are fitted well cancel out.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .gradients import only_trainable
from .layers import AdaptedLayer

Batches = Iterable[tuple[dict, int]]


def feature_matrices(
    model: nn.Module, layers: list[AdaptedLayer], batches: Batches, forward: Callable[[nn.Module, dict], Any]
) -> dict[str, torch.Tensor]:
    """
    What the inputs x of each layer span, as a matrix X with Xᵀ X = Σ x xᵀ / n over all tokens (GPM, arXiv 2103.09762).

    The second moment is summed and a root of it taken at the end: X has the singular values and the right singular
    vectors of the matrix that stacks all inputs, in d_in rows instead of n. With `torch.distributed` running, every
    process passes its own batches and all get the moments over all. Where a batch has an `attention_mask` of the
    layer's batch and length, padding does not count.

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
    moments = _Moments(layers)
    # a decoder's own mask may have the shape of the encoder's by accident, so that only one-stream models are masked
    masked = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    mask: torch.Tensor | None = None

    def observe(layer: AdaptedLayer) -> Callable:
        def hook(module: nn.Module, arguments: tuple) -> None:
            x = arguments[0]  # (..., d_in)
            moments.add(layer.name, x[mask] if mask is not None and x.shape[:-1] == mask.shape else x)

        return hook

    with _hooks(layer.module.register_forward_pre_hook(observe(layer)) for layer in layers), torch.no_grad():
        for inputs, _ in batches:
            mask = inputs["attention_mask"].bool() if masked and "attention_mask" in inputs else None
            forward(model, inputs)
    return moments.roots()


def token_gradient_matrices(
    model: nn.Module, layers: list[AdaptedLayer], batches: Batches, loss: Callable[[nn.Module, dict], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    What the gradients of single tokens span, as a matrix X with Xᵀ X = Σ G_tᵀ G_t / n over all tokens t.

    A token with input x and δ = dL/dy at the layer's output has the gradient G_t = δ xᵀ, so G_tᵀ G_t = ‖δ‖² x xᵀ: the
    inputs weighted by how strongly the loss depends on the layer's output there, the input side of the empirical
    Fisher information. Weights need no gradient, so the extra memory is one `(d_in, d_in)` matrix a layer.

    Args, return value and errors are those of [`feature_matrices`], but for `loss`, which maps model and inputs to the
    scalar mean loss of the batch. The gradients are those of the sum over its n samples.
    """
    moments = _Moments(layers)
    samples = 0

    def let_gradients_flow(module: nn.Module, arguments: tuple) -> tuple:
        x = arguments[0]
        return (x if x.requires_grad else x.detach().requires_grad_(), *arguments[1:])

    def observe(layer: AdaptedLayer) -> Callable:
        def hook(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            x = arguments[0].detach()

            def weigh(gradient: torch.Tensor) -> None:
                delta = gradient.to(moments.dtype_of(layer.name)) * samples  # (..., d_out)
                moments.add(layer.name, x * delta.norm(dim=-1, keepdim=True))

            if output.requires_grad:  # not in the first pass of gradient checkpointing
                output.register_hook(weigh)

        return hook

    handles = [layer.module.register_forward_pre_hook(let_gradients_flow) for layer in layers]
    handles += [layer.module.register_forward_hook(observe(layer)) for layer in layers]
    with _hooks(handles), only_trainable(model, []):
        for inputs, count in batches:
            samples = count
            loss(model, inputs).backward()
    return moments.roots()


class _Moments:
    """Sums of x xᵀ by layer, in float32 or wider."""

    def __init__(self, layers: list[AdaptedLayer]):
        self._sums = {
            layer.name: torch.zeros(
                layer.d_in,
                layer.d_in,
                dtype=torch.promote_types(layer.weight.dtype, torch.float32),
                device=layer.weight.device,
            )
            for layer in layers
        }
        self._counts = dict.fromkeys(self._sums, 0)

    def dtype_of(self, name: str) -> torch.dtype:
        return self._sums[name].dtype

    def add(self, name: str, x: torch.Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).to(self._sums[name].dtype)  # (tokens, d_in)
        self._sums[name].addmm_(x.T, x)
        self._counts[name] += len(x)

    def roots(self) -> dict[str, torch.Tensor]:
        """By layer name a root of the mean over all processes: diag(√λ) Qᵀ for a mean of Q diag(λ) Qᵀ."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for name, total in self._sums.items():
                count = torch.tensor(self._counts[name], device=total.device)
                for summand in (total, count):
                    torch.distributed.all_reduce(summand)
                self._counts[name] = int(count)
        roots = {}
        for name in list(self._sums):
            if self._counts[name] == 0:
                raise ValueError(
                    f"{name}: the snapshot's batches say nothing of this layer, so it cannot be protected. Is the "
                    "training set empty? If not, leave the layer out of `target_modules`."
                )
            total = self._sums.pop(name)  # one by one, so that sums and roots do not lie side by side
            eigenvalues, vectors = torch.linalg.eigh(total.double() / self._counts[name])
            noise = eigenvalues[-1] * len(total) * torch.finfo(total.dtype).eps  # of the sum
            eigenvalues = torch.where(eigenvalues > noise, eigenvalues, 0.0)
            roots[name] = (eigenvalues.sqrt().unsqueeze(-1) * vectors.T).to(total.dtype)
        return roots


@contextlib.contextmanager
def _hooks(handles: Iterable[Any]) -> Iterator[None]:
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
