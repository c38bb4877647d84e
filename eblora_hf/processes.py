"""Decompositions of many layers, shared out among the processes of a distributed run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .layers import AdaptedLayer
from .sharding import is_sharded


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


def _on_cpu(value: Any) -> Any:
    """A dataclass without tensors that name the device of this process."""
    if not dataclasses.is_dataclass(value):
        return value
    tensors = {key: tensor.cpu() for key, tensor in vars(value).items() if isinstance(tensor, torch.Tensor)}
    return dataclasses.replace(value, **tensors)
