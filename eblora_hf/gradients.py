"""The gradient snapshot: the mean gradient of a task with respect to the full frozen weights of the adapted layers."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from .accumulators import Storage
from .layers import AdaptedLayer
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
    """
    if num_samples < 1:
        raise ValueError("The gradient snapshot needs data, but the training set of the task is empty.")
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"snapshot_fraction lies in (0, 1], got {fraction}.")
    count = max(int(num_samples * fraction), 1)
    if seed is None:
        return torch.linspace(0, num_samples - 1, count, dtype=torch.float32).long().tolist()
    permutation = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    return permutation[:count].sort().values.tolist()


def mean_gradients(
    model: nn.Module,
    layers: list[AdaptedLayer],
    batches: Iterable[tuple[dict, int]],
    loss: Callable[[nn.Module, dict], torch.Tensor],
    storage: Storage = _ON_DEVICE,
) -> dict[str, torch.Tensor | Sketch]:
    """
    Mean gradient of a loss with respect to the full weight of each layer, Σ_b n_b G_b / Σ_b n_b, summed in float32.

    Each weight's gradient is moved into the sum as soon as backward has produced it and then freed, so the extra
    memory is one copy of the target weights in float32 plus one gradient, or what `storage` makes of it. With
    `torch.distributed` running, every process passes its own batches and all get the mean over all.

    Args:
        model (`nn.Module`): The model, unwrapped. Its parameters, their gradients and flags are left as they were.
        layers (`list[AdaptedLayer]`): The layers to take gradients of.
        batches (iterable of `(inputs, n)`): Batches with their weight n in the mean, usually the number of samples.
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

    def collect(layer: AdaptedLayer) -> Callable[[nn.Parameter], None]:
        def hook(weight: nn.Parameter) -> None:
            gradient, weight.grad = weight.grad, None
            sums[layer.name].add(layer.oriented(gradient), batch_weight)

        return hook

    with only_trainable(model, [layer.weight for layer in layers]):
        handles = [layer.weight.register_post_accumulate_grad_hook(collect(layer)) for layer in layers]
        try:
            for inputs, batch_weight in batches:
                loss(model, inputs).backward()
                weight_sum += batch_weight
        finally:
            for handle in handles:
                handle.remove()
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
    return {layer.name: sums[layer.name].mean(weight_sum) for layer in layers}


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
def only_trainable(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Within the context gradients flow to `weights` alone; other parameters keep the gradients they had."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for weight in weights:
            weight.grad = None
