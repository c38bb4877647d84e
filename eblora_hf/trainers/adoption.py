"""A LoRA adapter that was trained elsewhere becomes the first task of a sequence."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.factors import decompose_product
from ..adapters.layers import AdaptedLayer
from ..adapters.states import factors_of
from ..methods.base import Snapshots
from ..published.adapter_files import check_fits
from ..published.index import INDEX
from ..published.loading import NoSequenceError, fetch_sequence
from ..published.plain_lora import Adapter, read_adapter
from ..published.sequence import PublishedSequence


def read_source(source: str | Path, token: str | None = None) -> PublishedSequence | Adapter:
    """
    What a run is to go on from: a published sequence, or any plain LoRA adapter.

    Args:
        source (`str` or `Path`): A folder; or on the Hub `"user/repo"` or `"user/repo@revision"`, and of an adapter
            `"user/repo:subfolder"` too.
        token (`str`, *optional*): For the Hub.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if it is an adapter that is not plain LoRA, or a file was changed.
    """
    try:
        if ":" not in str(source) or Path(source).is_dir():
            return fetch_sequence(source, token=token)
    except NoSequenceError:
        pass
    try:
        return read_adapter(source, token=token)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{source} holds neither a sequence (there is no {INDEX} in it) nor a LoRA adapter: {error}"
        ) from error


def read_plain(source: str | Path, token: str | None = None) -> Adapter | None:
    """The plain LoRA adapter that a run is to go on from; `None` if it is a sequence, which is not opened here."""
    found = None if PublishedSequence.exists(source) else read_source(source, token)
    return found if isinstance(found, Adapter) else None


def name_of(adapter: Adapter) -> str:
    """A name for the task, from that of the folder or repository of the adapter."""
    last = adapter.source.rstrip("/").rpartition(":")[2].partition("@")[0].rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("._-")[:64].strip("._-") or "adopted"


def check_adoptable(
    adapter: Adapter, base_model: nn.Module, layers: list[AdaptedLayer], heads: Collection[str]
) -> None:
    """
    Raises if an adapter cannot be the first task of a run.

    Args:
        adapter ([`Adapter`]): The adapter.
        base_model (`nn.Module`): The model of the run.
        layers (`list[AdaptedLayer]`): The layers that the run adapts.
        heads (collection of `str`): The `modules_to_save` of the run.

    Raises:
        ValueError: naming what does not fit.
    """
    check_fits(adapter.state, adapter.config.modules_to_save or [], base_model, adapter.source)
    different = sorted(factors_of(adapter.state, "lora_A").keys() ^ {layer.name for layer in layers})
    if different:
        raise ValueError(
            f"The tasks of a sequence adapt the same layers, but those of {adapter.source} and of this run differ in "
            f"{', '.join(different):.300}. Leave out `peft_config` to take the layers of the adapter."
        )
    undeclared = sorted(set(adapter.config.modules_to_save or []) - set(heads))
    if undeclared:
        raise ValueError(
            f"{adapter.source} has trained {', '.join(undeclared)} as well. Name it in "
            f"LoraConfig(modules_to_save={sorted({*heads, *undeclared})})."
        )


def snapshots_of_update(adapter: Adapter, layers: list[AdaptedLayer], of: str) -> Snapshots:
    """
    What an update says of the inputs that it reacts to, in place of a snapshot of data that nobody has any more.

    Args:
        adapter ([`Adapter`]): With ΔW = B A = Σ σᵢ uᵢ vᵢᵀ in each layer.
        layers (`list[AdaptedLayer]`): The layers.
        of (`str`): What a snapshot would be of: for `"gradients"` the rows σᵢ vᵢᵀ `(r, d_in)`, else the moment
            Σ σᵢ² vᵢ vᵢᵀ `(d_in, d_in)`.

    Returns:
        `dict[str, torch.Tensor]`: By layer name.
    """
    lora_a, lora_b = factors_of(adapter.state, "lora_A"), factors_of(adapter.state, "lora_B")
    snapshots: dict[str, Any] = {}
    for layer in layers:
        _, sigma, right = decompose_product(lora_b[layer.name], lora_a[layer.name])
        rows = (sigma.unsqueeze(-1) * right).to(torch.float32)  # (r, d_in)
        snapshots[layer.name] = rows if of == "gradients" else rows.mT @ rows
    return snapshots
