"""Finds the LoRA factors in a PEFT model: names, shapes, orientation, scaling and depth."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

# `init_lora_weights` values that start from a zero update; pissa, olora, corda, loftq and others change the base
# weights
_PLAIN_INITS = (True, "gaussian", "eva")
_QUANTIZED = ("Params4bit", "Int8Params")  # the weights of bitsandbytes, which need not be installed


@dataclass(frozen=True)
class AdaptedLayer:
    """
    One linear layer with its LoRA factors, seen as y = x (W + γ B A)ᵀ with W `(d_out, d_in)`, A `(r, d_in)`, B
    `(d_out, r)`.

    Args:
        name (`str`): Path of the layer in the base model, e.g. `"model.layers.0.self_attn.q_proj"`.
        module (`peft.tuners.lora.layer.LoraLayer`): The PEFT module around the layer.
        adapter (`str`): Name of the adapter.
        depth (`int`, *optional*): Position of its block among the model's transformer blocks; `None` outside any
            block.
        num_blocks (`int`): Number of those blocks.
    """

    name: str
    module: Any  # PEFT's classes have no common type for what is used of them
    adapter: str
    depth: int | None
    num_blocks: int

    @property
    def lora_A(self) -> nn.Parameter:
        return self.module.lora_A[self.adapter].weight

    @property
    def lora_B(self) -> nn.Parameter:
        return self.module.lora_B[self.adapter].weight

    @property
    def weight(self) -> nn.Parameter:
        """The frozen weight as the model stores it: `(d_out, d_in)`, transposed in GPT-2's Conv1D; or quantized."""
        return self.module.get_base_layer().weight

    @property
    def quantized(self) -> bool:
        """Whether the weight is one of bitsandbytes, in 4 or 8 bits."""
        return is_quantized(self.module.get_base_layer())

    def dense_weight(self) -> torch.Tensor:
        """The frozen weight as numbers, `(d_out, d_in)` in float32 or wider."""
        base = self.module.get_base_layer()
        weight = _dequantized(base) if self.quantized else base.weight
        return self.oriented(weight.detach().to(self.sum_dtype))

    @property
    def scaling(self) -> float:
        """γ, from `lora_alpha`, `r`, `use_rslora`, `rank_pattern` and `alpha_pattern`."""
        return self.module.scaling[self.adapter]

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def d_in(self) -> int:
        return self.lora_A.shape[1]

    @property
    def d_out(self) -> int:
        return self.lora_B.shape[0]

    @property
    def sum_dtype(self) -> torch.dtype:
        """What sums over its tokens are kept in: float32, or float64 for a weight of that."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def oriented(self, weight: torch.Tensor) -> torch.Tensor:
        """Turns a tensor stored like `weight` into shape `(d_out, d_in)`."""
        return weight.T if isinstance(self.module.get_base_layer(), Conv1D) else weight


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight is one of bitsandbytes, in 4 or 8 bits."""
    return type(getattr(module, "weight", None)).__name__ in _QUANTIZED


def _dequantized(module: Any) -> torch.Tensor:
    """The weight of a bitsandbytes layer in floating point; PEFT's function for it loses the scales on a CPU."""
    weight = module.weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    scales = module.state.SCB if weight.SCB is None else weight.SCB  # the first forward pass takes them over
    return weight.data.float() * scales.unsqueeze(1) / 127.0


def keep_differentiable(model: nn.Module) -> None:
    """
    On a CPU with AVX512-BF16, bitsandbytes packs 4-bit weights for inference in the first evaluation, into a form that
    no gradient passes, and leaves them so. This undoes it and switches it off, or training would go wrong silently.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # unpacks the weight in place, if it was packed


def find_layers(model: PeftModel, adapter: str) -> list[AdaptedLayer]:
    """
    Lists the layers that a LoRA adapter trains, in the order of the model.

    Args:
        model (`PeftModel`): A model with a LoRA adapter.
        adapter (`str`): Name of the adapter.

    Returns:
        `list[AdaptedLayer]`.

    Raises:
        ValueError: if the adapter does not exist, is not LoRA, or uses what an orthonormal update cannot express
            (DoRA, biases, embeddings, convolutions, tied weights, initialisations that change the base); the message
            names it.
    """
    if adapter not in model.peft_config:
        raise ValueError(f"The model has no adapter {adapter!r}, only {list(model.peft_config)}.")
    _check_config(model.peft_config[adapter])
    base = model.get_base_model()
    blocks = _Blocks(base)
    tied = _tied_weights(base)
    layers = []
    for name, module in base.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in _adapters_of(module):
            continue
        _check_module(name, module, adapter)
        shared = tied.get(id(module.get_base_layer().weight), [])
        if len(shared) > 1:
            raise ValueError(
                f"{name}: LoRA on a tied weight is not supported, because the gradient of its other uses "
                f"({', '.join(shared)}) would mix into this layer's subspace. Leave it out of `target_modules`."
            )
        layers.append((name, module, blocks.locate(name)))
    if not layers:
        raise ValueError(f"The adapter {adapter!r} has no LoRA layer; check its `target_modules`.")
    offsets, num_blocks = blocks.count([block for _, _, block in layers])
    return [
        AdaptedLayer(name, module, adapter, None if block is None else offsets[block[0]] + block[1], num_blocks)
        for name, module, block in layers
    ]


class _Blocks:
    """The transformer blocks of a model: the children of its outermost lists of modules."""

    def __init__(self, model: nn.Module):
        self.lengths = {
            name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
        }

    def locate(self, name: str) -> tuple[str, int] | None:
        """The list and the position in it of the block that holds a layer, or `None` outside any block."""
        for match in re.finditer(r"\.(\d+)(?:\.|$)", name):
            if name[: match.start()] in self.lengths:
                return name[: match.start()], int(match.group(1))
        return None

    def count(self, located: list[tuple[str, int] | None]) -> tuple[dict[str, int], int]:
        """Where each list starts in the chain of all blocks of the lists in use, and the length of that chain."""
        offsets, total = {}, 0
        for block in located:
            if block is not None and block[0] not in offsets:
                offsets[block[0]] = total
                total += self.lengths[block[0]]
        return offsets, total


def _adapters_of(module: LoraLayer) -> set[str]:
    return {*module.lora_A.keys(), *module.lora_embedding_A.keys()}


def _tied_weights(model: nn.Module) -> dict[int, list[str]]:
    """The names under which each parameter appears, by the identity of the parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _check_config(config) -> None:
    if not isinstance(config, LoraConfig):
        raise ValueError(f"Expected a LoRA adapter (`peft.LoraConfig`), got {type(config).__name__}.")
    reasons = {
        "use_dora": "DoRA rescales every row of the weight, so the update is no longer s·U·Vᵀ",
        "lora_bias": "a bias on lora_B is trained outside the subspace constraint",
        "target_parameters": "LoRA on bare parameters, such as fused experts, has no linear layer to take a gradient "
        "of (`target_modules='all-linear'` adds them for some models: name the layers of the attention instead)",
        "layer_replication": "replicated layers share one weight between several adapters",
        "trainable_token_indices": "trained token embeddings are not protected from later tasks",
    }
    for option, reason in reasons.items():
        if getattr(config, option, None):
            raise ValueError(f"LoraConfig({option}=…) is not supported: {reason}. Remove it.")
    if config.bias != "none":
        raise ValueError(
            f"LoraConfig(bias={config.bias!r}) is not supported: the biases of the base model would be trained "
            "without protection and are not part of a task's adapter. Use bias='none'."
        )
    if config.init_lora_weights not in _PLAIN_INITS:
        raise ValueError(
            f"LoraConfig(init_lora_weights={config.init_lora_weights!r}) is not supported: it changes the base "
            "weights, on which all tasks of a sequence rely, or starts from an update that is not zero. Use "
            "init_lora_weights=True; the factors are initialised per task anyway."
        )


def _check_module(name: str, module: LoraLayer, adapter: str) -> None:
    base = module.get_base_layer()
    # FSDP2 derives a class from that of each module it shards; PEFT derives one for the weights of torchao
    plain = isinstance(module, LoraLinear) and not type(module).__module__.endswith("torchao")
    plain = plain and isinstance(base, (nn.Linear, Conv1D))
    if not plain and not is_quantized(base):
        raise ValueError(
            f"{name}: LoRA on {type(base).__name__} ({type(module).__name__}) is not supported: only nn.Linear, "
            "Conv1D and the 4- and 8-bit layers of bitsandbytes have the weight matrix that the gradient subspace is "
            "taken of. Leave it out of `target_modules`."
        )
    if module.lora_variant.get(adapter) is not None:
        variant = type(module.lora_variant[adapter]).__name__
        raise ValueError(f"{name}: the LoRA variant {variant} is not supported, its update is not s·U·Vᵀ.")
    if module.merged:
        raise ValueError(f"{name}: the adapter is merged into the base. Call `model.unmerge_adapter()` first.")
    if not base.weight.is_floating_point() and not is_quantized(base):
        raise ValueError(
            f"{name}: a weight of dtype {base.weight.dtype} is not supported: of quantized bases only those of "
            "bitsandbytes are (`BitsAndBytesConfig`)."
        )
