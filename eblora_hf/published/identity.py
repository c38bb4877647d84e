"""Which base model a sequence was learnt on."""

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from torch import nn
from transformers.utils import logging

from ..adapters.layers import is_quantized
from ..adapters.sharding import whole
from .schema import BaseModelIdentity

logger = logging.get_logger(__name__)


def describe_base_model(
    model: nn.Module, heads: Collection[str] = (), label_layer: str | None = None
) -> BaseModelIdentity:
    """
    Identity of a base model.

    Args:
        model (`nn.Module`): The model, with or without adapters.
        heads (collection of `str`): Names of its `modules_to_save`, whose values do not matter: adapters bring their
            own.
        label_layer (`str`, *optional*): The layer among them whose number of outputs does not matter either.

    Returns:
        `dict`: Its name and revision as far as known, its class, a hash of the names and shapes of all parameters, and
        one of up to 4,096 values of each, rounded to bf16 so that the precision it is loaded in does not matter
        (`None` for fp16 and quantized weights, which round differently).
    """
    config = getattr(model, "config", None)
    origin, revision = _origin(model)
    labels = getattr(config, "num_labels", None) if type(model).__name__.endswith("Classification") else None
    shapes: list[tuple[str, list[int]]] = []
    values: Any = hashlib.sha256()  # None once a weight cannot be compared
    packed = {  # quantized weights are stored in another shape
        f"{name}.weight": [module.out_features, module.in_features]
        for name, module in model.named_modules()
        if is_quantized(module)
    }
    own = {
        name.replace(".base_layer", "").replace(".original_module", ""): (name, parameter)
        for name, parameter in model.named_parameters()
        if ".lora_" not in name and ".modules_to_save." not in name  # what PEFT added
    }
    for name, (stored, parameter) in sorted(own.items()):
        shape = packed.get(stored, list(parameter.shape))
        of_labels = label_layer is not None and name.rpartition(".")[0] == label_layer
        shapes.append((name, [-1, *shape[1:]] if of_labels else shape))
        if stored in packed or parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            values = None
        elif values is not None and not any(f".{head}." in f".{name}" for head in heads):
            every = max(parameter.numel() // 4096, 1)
            sample = whole(parameter.detach()).flatten()[::every].to("cpu", torch.bfloat16)
            values.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    identity: BaseModelIdentity = {
        "name_or_path": origin,  # paths of one machine are nobody else's business
        "revision": revision,
        "architecture": type(model).__name__,
        "num_labels": labels if label_layer is None else None,
        "heads": sorted(heads),
        "fingerprint": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
        "weights": None if values is None else values.hexdigest(),
    }
    if label_layer is not None:
        identity["label_layer"] = label_layer
    return identity


def local_path(model: nn.Module) -> str | None:
    """The folder that a model was loaded from, if it was one of this machine."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(Path(name).absolute()) if name and Path(name).is_dir() else None


def _origin(model: nn.Module) -> tuple[str, str | None]:
    """
    The repository on the Hub that a model came from, and the commit as far as it can be known; else `("", None)`.

    A model does not say by which revision it was loaded. That is the one in its `LoraConfig`, or the commit of the
    only copy in the cache.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or ""
    if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name) or Path(name).exists():
        return "", None
    stated = {adapter.revision for adapter in getattr(model, "peft_config", {}).values() if adapter.revision}
    cached = Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")
    commits = [path.parent.name for path in cached.glob("*/config.json")]
    known = [*stated, getattr(config, "_commit_hash", None), *(commits if len(commits) == 1 else [])]
    return name, next((revision for revision in known if revision), None)


def check_same_model(expected: BaseModelIdentity, model: nn.Module, whose: str) -> None:
    """
    Raises if a model has other weights, by name, shape or value, than the described one.

    Args:
        expected (`dict`): From [`describe_base_model`].
        model (`nn.Module`): The model, with or without adapters.
        whose (`str`): What was learnt on it, to begin the message with.

    Raises:
        ValueError: naming both.
    """
    described = describe_base_model(model, expected.get("heads", ()), expected.get("label_layer"))
    if described["fingerprint"] != expected["fingerprint"]:
        raise ValueError(
            f"{whose} was learnt on {_named(expected)}, whose weights have other names or shapes than those of "
            f"{_named(described)}. Load the base model it was learnt on."
        )
    if described["weights"] is None or expected["weights"] is None:
        logger.warning(
            "The values of the base model's weights were not compared: fp16 and integers round differently."
        )
    elif described["weights"] != expected["weights"]:
        raise ValueError(
            f"{whose} was learnt on {_named(expected)}, whose weights have other values than those of "
            f"{_named(described)}: its updates mean nothing on them. Load the base model it was learnt on; "
            "if a part of it was initialised at random, save it first and load it again."
        )


def _named(identity: BaseModelIdentity) -> str:
    labels = identity["num_labels"]
    kind = identity["architecture"] + (f" with {labels} labels" if labels is not None else "")
    return f"{identity['name_or_path']!r} ({kind})" if identity["name_or_path"] else f"a local {kind}"
