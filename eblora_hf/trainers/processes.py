"""Work on many layers shared out among the processes of a distributed run, and a check that all hold the same."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..adapters.layers import AdaptedLayer
from ..adapters.sharding import is_sharded


def spread_over_processes(
    compute: Callable[[list[AdaptedLayer]], dict[str, Any]], layers: list[AdaptedLayer]
) -> dict[str, Any]:
    """
    What `compute` says of each layer, on all processes the same to the last bit.

    Every process computes a share of the layers, since decompositions take long and may differ in the last bit from
    one to the other. What `compute` writes into the adapters of its layers reaches the other processes as well;
    sharded adapters it must leave alone.

    Args:
        compute (`Callable`): Returns numbers or dataclasses by layer name for some layers.
        layers (`list[AdaptedLayer]`): All layers, in the same order everywhere.

    Raises:
        Exception: what `compute` raised on any process, on all of them.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return compute(layers)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own: dict[str, Any] | Exception
    try:
        own = {name: _on_cpu(value) for name, value in compute(layers[rank::size]).items()}
    except Exception as error:
        own = error
    shares: list[Any] = [None] * size
    torch.distributed.all_gather_object(shares, own)
    for share in shares:
        if isinstance(share, Exception):
            raise share
    for index, layer in enumerate(layers):
        for parameter in (layer.lora_A, layer.lora_B):
            if not is_sharded(parameter):
                torch.distributed.broadcast(parameter.data, src=index % size)
    results = {name: value for share in shares for name, value in share.items()}
    return {layer.name: results[layer.name] for layer in layers if layer.name in results}


@contextlib.contextmanager
def together(doing: str) -> Iterator[None]:
    """
    What fails within the context on one process is raised on all of them at its end.

    For work that waits for no other process: all arrive at the end, and none goes on to wait for one that has failed.

    Args:
        doing (`str`): What is done, for the message on the others.

    Raises:
        RuntimeError: on the processes on which it has not failed; on those on which it has, what was raised.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    causes: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(causes, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, cause in enumerate(causes):
        if cause is not None:
            raise RuntimeError(f"Process {rank} has failed while {doing}: {cause}")


def broadcast_model(model: nn.Module) -> None:
    """Gives all processes the first one's parameters and buffers, as DistributedDataParallel does when it wraps."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in (*model.parameters(), *model.buffers()):
            moved = tensor.data.contiguous()
            torch.distributed.broadcast(moved, src=0)
            if moved is not tensor.data:
                tensor.data.copy_(moved)


def check_same_everywhere(tensors: dict[str, torch.Tensor]) -> None:
    """
    Compares checksums of tensors over all processes.

    Args:
        tensors (`dict[str, torch.Tensor]`): By name, what should be the same to the last bit on all of them.

    Raises:
        RuntimeError: on all processes if it is not; the message names a tensor.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    own = {name: _checksum(tensor) for name, tensor in tensors.items()}
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, own)
    different = sorted(name for name in everywhere[0] if len({other.get(name) for other in everywhere}) > 1)
    if different:
        raise RuntimeError(
            f"The processes hold different values of {len(different)} tensors that have to be the same to the last "
            f"bit, {different[0]} for one. Do all load the same model and run the same code on the same kind of "
            "device? If they have come apart while training, resume from the last checkpoint."
        )


def _checksum(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def _on_cpu(value: Any) -> Any:
    """A dataclass without tensors that name the device of this process."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    tensors = {key: tensor.cpu() for key, tensor in vars(value).items() if isinstance(tensor, torch.Tensor)}
    return dataclasses.replace(value, **tensors)
