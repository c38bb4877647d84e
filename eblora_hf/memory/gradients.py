"""The gradient snapshot: the mean gradient of a task with respect to the full frozen weights of the adapted layers."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ..adapters.layers import AdaptedLayer
from .accumulators import Storage
from .sketch import Sketch

_ON_DEVICE = Storage()


def snapshot_indices(num_samples: int, fraction: float, seed: int | None = None) -> list[int]:
    """
    Chooses the samples of a snapshot.

    Args:
        num_samples (`int`): Size of the data set.
        fraction (`float`): Share of it to use, in (0, 1]; at least one sample is taken.
        seed (`int`, *optional*): Seed of a random choice. `None` takes evenly spaced samples as the released code
            does: floor(linspace(0, N-1, int(N·fraction))) in float32.

    Returns:
        `list[int]`: Indices in ascending order.

    Raises:
        ValueError: if the data set is empty or the fraction lies outside (0, 1].

    Example:

    >>> snapshot_indices(10, 0.5)
    [0, 2, 4, 6, 9]
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"snapshot_fraction lies in (0, 1], got {fraction}.")
    return choose_indices(num_samples, max(int(num_samples * fraction), 1), seed)


def choose_indices(num_samples: int, count: int, seed: int | None = None) -> list[int]:
    """`count` of the samples, or all; chosen as [`snapshot_indices`] does."""
    if num_samples < 1:
        raise ValueError("The gradient snapshot needs data, but the training set of the task is empty.")
    count = min(count, num_samples)
    if seed is None:
        return torch.linspace(0, num_samples - 1, count, dtype=torch.float32).long().tolist()
    permutation = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    return permutation[:count].sort().values.tolist()


def share_batches(indices: list[int], size: int, rank: int = 0, processes: int = 1) -> list[tuple[list[int], int]]:
    """
    The batches that one of several processes takes of a snapshot, and their weights.

    All processes get as many batches, as collectives inside a forward pass need; one that has no batch left repeats
    the first with weight 0. So every sample counts once, whatever the number of processes.

    Args:
        indices (`list[int]`): Samples of the snapshot.
        size (`int`): Samples of a batch.
        rank (`int`), processes (`int`): Which process of how many.

    Returns:
        `list[tuple[list[int], int]]`: Samples of each batch, and their number or 0.

    Example:

    >>> share_batches([0, 1, 2, 3, 4], size=2, rank=0, processes=2)
    [([0, 1], 2), ([4], 1)]
    >>> share_batches([0, 1, 2, 3, 4], size=2, rank=1, processes=2)  # as many batches, the second without weight
    [([2, 3], 2), ([0, 1], 0)]
    """
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    own = [(batch, len(batch)) for batch in batches[rank::processes]]
    rounds = -(-len(batches) // processes)
    return own + [(batches[0], 0)] * (rounds - len(own))


def mean_gradients(
    model: nn.Module,
    layers: list[AdaptedLayer],
    batches: Iterable[tuple[dict, int]],
    loss: Callable[[nn.Module, dict], torch.Tensor],
    storage: Storage = _ON_DEVICE,
) -> dict[str, torch.Tensor | Sketch]:
    """
    Mean gradient of a loss with respect to the full weight of each layer, Σ_b n_b G_b / Σ_b n_b, summed in float32.

    With X `(tokens, d_in)` the inputs of a layer and Δ = dL/dY `(tokens, d_out)`, its gradient is G_b = ΔᵀX. No weight
    needs a gradient of its own, so that weights may be quantised or sharded, and the extra memory is one matrix of the
    weight's shape a layer in float32, or what `storage` makes of it. With `torch.distributed` running, every process
    passes its own batches and all get the mean over all.

    Args:
        model (`nn.Module`): The model, unwrapped. Its parameters, their gradients and flags are left as they were.
        layers (`list[AdaptedLayer]`): The layers to take gradients of.
        batches (iterable of `(inputs, n)`): Batches with their weight n in the mean, usually the number of samples. A
            batch of weight 0 counts for nothing.
        loss (`Callable`): Maps model and inputs to the scalar mean loss of the batch.
        storage ([`Storage`], *optional*): Where the sums are kept, and whether they are sketches.

    Returns:
        `dict[str, torch.Tensor]`: Per layer name, G of shape `(d_out, d_in)` in float32 (float64 for a float64
            weight); or a [`Sketch`] of it.

    Raises:
        ValueError: if there is no batch, or a layer received no gradient; the message names the layer.
    """
    sums = {layer.name: storage.matrix(layer.d_out, layer.d_in) for layer in layers}
    weight_sum = 0.0
    batch_weight = 0.0

    def add(layer: AdaptedLayer, x: torch.Tensor, delta: torch.Tensor) -> None:
        if batch_weight == 0:
            return
        rows = (delta.flatten(0, -2).to(layer.sum_dtype), x.flatten(0, -2).to(layer.sum_dtype))
        sums[layer.name].add(*rows, batch_weight)

    with observed_gradients(model, layers, add):
        for inputs, batch_weight in batches:
            loss(model, inputs).backward()
            weight_sum += batch_weight
    reached = torch.tensor([weight_sum, *(float(not sums[layer.name].empty) for layer in layers)], dtype=torch.float64)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        reached = reached.to(layers[0].weight.device)
        torch.distributed.all_reduce(reached)
        for layer in layers:  # a process whose batches did not reach a layer takes part all the same
            for summand in sums[layer.name].tensors(like=layer.weight):
                all_reduce(summand, layer.weight.device)
    weight_sum, *counts = reached.tolist()
    if weight_sum == 0:
        raise ValueError("The gradient snapshot needs data, but no batch was given.")
    for layer, count in zip(layers, counts, strict=True):
        if count == 0:
            raise ValueError(
                f"{layer.name}: the loss sends no gradient to this layer, so it cannot be protected. Leave it out of "
                "`target_modules`."
            )
    return {layer.name: sums.pop(layer.name).mean(weight_sum) for layer in layers}


class _Observe(torch.autograd.Function):
    """
    The identity on a layer's output that shows its gradient together with the layer's input.

    The input is saved as autograd saves tensors, so that activation checkpointing recomputes it instead of keeping it.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, x: torch.Tensor, see: Callable) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.see = see
        return output.clone()  # models may change it in place, which no view out of here allows

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.see(ctx.saved_tensors[0].detach(), gradient)
        return gradient, None, None


See = Callable[[AdaptedLayer, torch.Tensor, torch.Tensor], None]


@contextlib.contextmanager
def observed_gradients(model: nn.Module, layers: list[AdaptedLayer], see: See) -> Iterator[None]:
    """
    Within the context every backward pass calls `see` with each layer, its inputs X `(..., d_in)` and dL/dY `(...,
    d_out)`. No parameter gets a gradient.
    """

    def let_gradients_flow(module: nn.Module, arguments: tuple) -> tuple:
        x = arguments[0]
        return (x if x.requires_grad else x.detach().requires_grad_(), *arguments[1:])

    handles = [layer.module.register_forward_pre_hook(let_gradients_flow) for layer in layers]
    try:
        with watched_gradients(layers, see), _untouched(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def watched_gradients(layers: list[AdaptedLayer], see: See) -> Iterator[None]:
    """[`observed_gradients`] while a model is trained: its parameters get the gradients that they would get anyway."""

    def watch(layer: AdaptedLayer) -> Callable:
        def hook(module: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
            return _Observe.apply(output, arguments[0], partial(see, layer))

        return hook

    handles = [layer.module.register_forward_hook(watch(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def all_reduce(tensor: torch.Tensor, device: torch.device) -> None:
    """
    Sums a tensor over all processes, in place. One kept on the CPU goes through `device`, as NCCL needs it, and a
    transposed one through memory of its own order, the same on all processes.
    """
    moved = tensor.to(device).contiguous()
    torch.distributed.all_reduce(moved)
    if moved is not tensor:
        tensor.copy_(moved)


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """
    Within the context no parameter gets a gradient that stays; they keep those they had.

    They are trainable or not as in training: a user's loss may ask, and FSDP2 decides by it in its first forward pass.
    Only those whose optimizer steps inside the backward pass are frozen.
    """
    parameters = list(model.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag, gradient in zip(parameters, flags, gradients, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = gradient
