"""The files of one task, as bytes."""

from typing import Any

import torch

from ..adapters.states import AdapterState, factors_of
from ..manifold.penalty import Curvature
from ..memory.basis import BasisExtension
from .adapter_files import check_adapter_file
from .checks import check_columns
from .files import json_bytes, tensor_bytes
from .index import ADAPTER, ADAPTER_CONFIG, SUBSPACE, TRAINING
from .schema import check_training

_INPUTS, _OUTPUTS = ".curvature_inputs", ".curvature_outputs"


def task_files(
    name: str,
    adapter: AdapterState,
    config: dict[str, Any],
    extensions: dict[str, BasisExtension] | None,
    training: dict[str, Any],
) -> dict[str, bytes]:
    """
    The content of a task's folder by file name.

    Args:
        name (`str`): Of the task, for messages.
        adapter (`dict[str, torch.Tensor]`): Its folded adapter.
        config (`dict`): For `adapter_config.json`.
        extensions (`dict[str, BasisExtension]`, *optional*): What it adds to the basis of each layer. A layer left out
            adds nothing; `None` is for a method that keeps no basis, and there is no file of it.
        training (`dict`): How it was trained.

    Raises:
        ValueError: if what is given could not be read again; the message names the field.
    """
    files = {
        ADAPTER: tensor_bytes(adapter),
        ADAPTER_CONFIG: json_bytes(config),
        TRAINING: json_bytes(training),
    }
    check_adapter_file(files[ADAPTER_CONFIG])
    check_training(files[TRAINING])
    if extensions is not None:
        lora_a = factors_of(adapter, "lora_A")
        nothing = {layer: BasisExtension(a.new_zeros(a.shape[1], 0), captured=0.0) for layer, a in lora_a.items()}
        extensions = nothing | extensions
        check_columns({layer: x.columns for layer, x in extensions.items()}, adapter, {}, f"The basis of {name!r}")
        files[SUBSPACE] = tensor_bytes(
            {f"{layer}.columns": x.columns.cpu() for layer, x in extensions.items()}
            | {f"{layer}.captured": torch.tensor(x.captured, dtype=torch.float64) for layer, x in extensions.items()}
            | {f"{layer}{_INPUTS}": x.beyond.cpu() for layer, x in extensions.items() if x.beyond is not None}
            | {f"{layer}{_OUTPUTS}": x.outputs.cpu() for layer, x in extensions.items() if x.outputs is not None}
        )
    return files


def curvatures_of(tensors: dict[str, torch.Tensor]) -> dict[str, Curvature]:
    """The roots of the curvature by layer name, where there are both, out of the content of `subspace.safetensors`."""
    layers = [name.removesuffix(_INPUTS) for name in tensors if name.endswith(_INPUTS)]
    return {
        layer: Curvature(tensors[f"{layer}{_INPUTS}"], tensors[f"{layer}{_OUTPUTS}"])
        for layer in layers
        if f"{layer}{_OUTPUTS}" in tensors
    }


def columns_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The new columns `(d_in, k)` by layer name, out of the content of `subspace.safetensors`."""
    return {name.removesuffix(".columns"): tensor for name, tensor in tensors.items() if name.endswith(".columns")}
