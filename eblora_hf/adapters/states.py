"""What an adapter is as tensors by PEFT's file names, and the configuration that such tensors need."""

import copy
import re
from collections.abc import Iterable

import torch
from peft import LoraConfig

AdapterState = dict[str, torch.Tensor]

_PREFIX = "base_model.model."


def factor_key(layer: str, kind: str) -> str:
    """PEFT's name of a factor, `"lora_A"` or `"lora_B"`, of a layer."""
    return f"{_PREFIX}{layer}.{kind}.weight"


def factors_of(adapter: AdapterState, kind: str) -> AdapterState:
    """lora_A or lora_B of an adapter by layer name."""
    suffix = f".{kind}.weight"
    return {
        key.removeprefix(_PREFIX).removesuffix(suffix): value for key, value in adapter.items() if key.endswith(suffix)
    }


def heads_of(adapter: AdapterState) -> AdapterState:
    """The `modules_to_save` in an adapter: all that is not a LoRA factor."""
    return {key: value for key, value in adapter.items() if ".lora_A." not in key and ".lora_B." not in key}


def in_full(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision as float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def folded_config(config: LoraConfig, adapter: AdapterState) -> LoraConfig:
    """
    The configuration of a folded adapter: ranks read from its tensors, every scaling 1.

    Args:
        config (`LoraConfig`): The configuration the adapter was trained with.
        adapter (`dict[str, torch.Tensor]`): A folded adapter, or a concatenation of some.
    """
    ranks = {name: tensor.shape[0] for name, tensor in factors_of(adapter, "lora_A").items()}
    folded = ranked_config(config, ranks)
    folded.lora_dropout = 0.0
    folded.init_lora_weights = True
    folded.inference_mode = True
    return folded


def ranked_config(config: LoraConfig, ranks: dict[str, int]) -> LoraConfig:
    """The configuration with a rank per layer name and every scaling 1."""
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    ranked = copy.deepcopy(config)
    ranked.r = ranked.lora_alpha = common
    # anchored: PEFT would take a bare name for every layer that ends in it
    ranked.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    ranked.alpha_pattern = dict(ranked.rank_pattern)
    ranked.use_rslora = False
    return ranked


def target_exactly(config: LoraConfig, names: Iterable[str]) -> None:
    """Targets these layers alone: `"all-linear"` was resolved to names that also match a head, now wrapped by PEFT."""
    config.target_modules = "|".join(re.escape(name) for name in names)  # PEFT wants a full match of a string
    config.exclude_modules = None


def exact_config(adapter: AdapterState, task_type: str | None, heads: Iterable[str]) -> LoraConfig:
    """
    The configuration of a folded adapter from its tensors alone: their layers, by their full names, and their ranks.

    Args:
        adapter (`dict[str, torch.Tensor]`): A folded adapter, or a concatenation of some.
        task_type (`str`, *optional*): PEFT's name of what the model is for.
        heads (iterable of `str`): Names of its `modules_to_save`.
    """
    config = LoraConfig(task_type=task_type, modules_to_save=list(heads) or None)  # type: ignore[arg-type]
    target_exactly(config, factors_of(adapter, "lora_A"))
    return folded_config(config, adapter)
