"""What a data set says of the full weights of a model: mean gradients, or moments of its tokens."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..adapters.layers import AdaptedLayer
from ..adapters.switches import pretrained
from ..config import EBLoRAConfig
from ..memory.accumulators import Storage
from ..memory.gradients import mean_gradients, share_batches, snapshot_indices
from ..memory.moments import feature_moments, token_gradient_moments
from ..methods.base import Snapshot, Snapshots

_COLLECTORS = {
    "gradients": mean_gradients,
    "token-gradients": token_gradient_moments,
    "features": feature_moments,
}


def take_snapshot(
    model: PeftModel,
    layers: list[AdaptedLayer],
    of: Snapshot,
    *,
    samples: int,
    load: Callable[[list[list[int]]], Iterable[Any]],
    loss: Callable[[PeftModel, Any], torch.Tensor],
    config: EBLoRAConfig,
    seed: int,
    batch_size: int,
    process_index: int = 0,
    world_size: int = 1,
) -> Snapshots:
    """
    Sums up what a share of a data set says of each layer, with the model in evaluation mode.

    Args:
        model (`PeftModel`): The model; it is left in the mode it was in.
        layers (`list[AdaptedLayer]`): Its adapted layers.
        of (`str`): `"gradients"`, the mean gradient of each layer `(d_out, d_in)`; `"token-gradients"` or
            `"features"`, the second moment `(d_in, d_in)` of its tokens' gradients or inputs.
        samples (`int`): Size of the data set, of which `config.snapshot_fraction` is used.
        load (`Callable`): Yields the inputs of each of the given batches of indices, on the model's device.
        loss (`Callable`): Maps model and inputs to the scalar mean loss of the batch.
        config ([`EBLoRAConfig`]): The options that begin with `snapshot`.
        seed (`int`): Seed of the choice of samples.
        batch_size (`int`): Samples of a batch.
        process_index (`int`, defaults to 0), world_size (`int`, defaults to 1): Which share of the batches is this
            process's.

    Returns:
        `dict[str, torch.Tensor]`: By layer name; with `snapshot_sketch` [`Sketch`] objects.

    Raises:
        ValueError: if there is no sample, or the loss does not reach a layer; the message names it.
    """
    even = config.snapshot_sampling == "even"
    indices = snapshot_indices(samples, config.snapshot_fraction, None if even else seed)
    shares = share_batches(indices, batch_size, process_index, world_size)
    inputs = zip(load([batch for batch, _ in shares]), (weight for _, weight in shares), strict=True)
    at = pretrained(model) if config.snapshot_at == "pretrained" else contextlib.nullcontext()
    storage = Storage(config.snapshot_offload, config.snapshot_sketch)
    with _without_dropout(model), at:
        return _COLLECTORS[of](model, layers, inputs, loss, storage)


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in evaluation mode, but for activation checkpointing."""
    training = model.training
    model.eval()
    rates: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # the module itself, not its children: it checkpoints in training mode alone
            # some drop by themselves then: `nn.functional.dropout(p=self.dropout, training=self.training)`, layers
            own = [(name, value) for name, value in vars(module).items() if "drop" in name and type(value) is float]
            rates += [(module, name, value) for name, value in own]
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
        model.train(training)
