"""Parameters that FSDP2 keeps in shards: whole tensors out of them, and whole tensors into them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is the shard of one (a `DTensor`)."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def trains_shards(model: nn.Module) -> bool:
    """Whether a model has trainable parameters that are sharded."""
    return any(is_sharded(parameter) for parameter in model.parameters() if parameter.requires_grad)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, on every process that holds a shard; all of them have to call it."""
    if not is_sharded(tensor):
        return tensor
    gathered: Any = cast("DTensor", tensor).full_tensor()
    return gathered.wait() if hasattr(gathered, "wait") else gathered  # the collective may still be under way


def gather(shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    The whole tensors of one shape that some shards belong to, in one collective.

    Args:
        shards (`Sequence[torch.Tensor]`): n sharded tensors, or plain ones.

    Returns:
        `torch.Tensor` of shape `(n, ...)`.
    """
    return whole(torch.stack(list(shards)))


@torch.no_grad()
def scatter(values: torch.Tensor, shards: Sequence[torch.Tensor]) -> None:
    """
    Writes whole tensors into shards, without communication.

    Args:
        values (`torch.Tensor` of shape `(n, ...)`): The same on all processes.
        shards (`Sequence[torch.Tensor]`): n tensors sharded alike, or plain ones.
    """
    if is_sharded(shards[0]):
        from torch.distributed.tensor import DTensor, Replicate, Shard

        sharded = cast("list[DTensor]", shards)
        mesh, before = sharded[0].device_mesh, sharded[0].placements
        # stacking has moved every dimension on by one
        placements = [Shard(place.dim + 1) if isinstance(place, Shard) else place for place in before]
        everywhere = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
        values = everywhere.redistribute(placements=placements).to_local()
        shards = [shard.to_local() for shard in sharded]
    torch._foreach_copy_(list(shards), list(values.unbind()))
