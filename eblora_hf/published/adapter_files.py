"""LoRA adapters as files: what is believed of those that somebody else has written."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adapters.states import AdapterState, exact_config, factors_of, heads_of
from .files import check_no_pointer
from .schema import MAX_JSON, AdapterFile, checked, read_checked

_FACTOR = re.compile(r"base_model\.model\.([\w-]+(\.[\w-]+)*)\.lora_[AB]\.weight")
_HEAD = re.compile(r"base_model\.model\.([\w-]+(\.[\w-]+)*)")
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TASK_TYPES = {  # PEFT's, by the endings of transformers' class names: its wrappers call the model by them
    "ForSequenceClassification": ("SEQ_CLS",),
    "ForTokenClassification": ("TOKEN_CLS",),
    "ForQuestionAnswering": ("QUESTION_ANS",),
    "ForCausalLM": ("CAUSAL_LM",),
    "LMHeadModel": ("CAUSAL_LM",),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", "CAUSAL_LM"),
    "ForImageClassification": (),
}
# options with which the update is more, or other, than γ B A on a weight of the base model
_OTHER_UPDATES = {
    "use_dora": "DoRA rescales every row of the weight",
    "lora_bias": "lora_B has a bias",
    "use_qalora": "QALoRA pools the inputs of lora_A",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "alora_invocation_tokens": "aLoRA acts on a part of the tokens",
    "arrow_config": "Arrow routes tokens to several adapters",
    "kasa_config": "KaSA changes the base weights",
    "target_parameters": "its factors belong to bare parameters, not to linear layers",
    "layer_replication": "several adapters share one weight",
    "trainable_token_indices": "trained token embeddings are not a LoRA update",
}
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_adapter_file(path: Path) -> AdapterFile:
    """
    Reads an `adapter_config.json`.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is not that of plain LoRA; the message names the file and the field.
    """
    return read_checked(path, "configuration of a LoRA adapter", MAX_JSON, check_adapter_file)


def check_adapter_file(data: bytes) -> AdapterFile:
    """The content of an `adapter_config.json`. Raises a `ValueError` if it is not that of plain LoRA."""
    content: dict[str, Any] = checked(dict, data)
    kind = content.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"it is a {kind!s:.40} adapter, expected LORA: only LoRA has the update ΔW = γ B A")
    for option, reason in _OTHER_UPDATES.items():
        if content.get(option):
            raise ValueError(f"it is not plain LoRA ({option}): {reason}")
    file: AdapterFile = checked(AdapterFile, data)
    init = file.init_lora_weights
    if isinstance(init, str) and init.startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise ValueError(
            f"it was trained with init_lora_weights={init!r}, which changes the base weights: its factors are not an "
            "update of the base model. Convert it with PEFT's "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=…)` first"
        )
    return file


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """
    Reads a safetensors file of floating-point tensors.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: naming the file, if it is damaged, a pointer of Git LFS, or holds what is not a finite number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; restore it from a copy.")
    check_no_pointer(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error!s:.200}.") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{path}: {name!r:.200} is of {tensor.dtype}, expected floating-point numbers.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name!r:.200} is not finite (inf or NaN).")
    return tensors


def check_factors(state: AdapterState, source: str | Path) -> None:
    """
    Raises if tensors are not those of a LoRA adapter on linear layers: pairs of factors of one rank, and heads.

    Raises:
        ValueError: naming the source and what is wrong.
    """
    lora_a, lora_b = factors_of(state, "lora_A"), factors_of(state, "lora_B")
    strange = [key for key in state if not (_FACTOR if ".lora_" in key else _HEAD).fullmatch(key)]
    strange += lora_a.keys() ^ lora_b.keys()
    if strange or not lora_a:
        found = f"has {', '.join(map(repr, sorted(strange)))}"[:300] if strange else "has no LoRA factor"
        raise ValueError(f"{source} {found}: expected LoRA on linear layers, lora_A.weight and lora_B.weight of each.")
    for name, a in lora_a.items():
        b = lora_b[name]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            raise ValueError(
                f"{source}: {name} has factors B {tuple(b.shape)} and A {tuple(a.shape)}, expected (d_out, r) and "
                "(r, d_in)."
            )


def check_fits(
    state: AdapterState,
    declared: Collection[str],
    model: nn.Module,
    source: str | Path,
    labels: tuple[str | None, int] = (None, 0),
) -> None:
    """
    Raises if an adapter has a place on the model for other than all its tensors: those of layers that the model does
    not have, of other shapes, or of parameters that no declared head has.

    Args:
        state (`dict[str, torch.Tensor]`): The adapter.
        declared (collection of `str`): The `modules_to_save` of its configuration.
        model (`nn.Module`): The model without adapters, or with those that PEFT has wrapped its modules in.
        source (`str` or `Path`): For the message.
        labels (`tuple[str, int]`, *optional*): A layer of a head that has so many outputs in the adapter, whatever it
            has on the model.

    Raises:
        ValueError: naming the tensor.
    """
    modules, parameters, buffers = _modules(model), _parameters(model), _buffers(model)
    lora_b = factors_of(state, "lora_B")
    for name, a in factors_of(state, "lora_A").items():
        shape = _shape(modules.get(name))
        if shape != (lora_b[name].shape[0], a.shape[1]):
            has = "has no linear layer of that name" if shape is None else f"has one of {shape} there"
            raise ValueError(
                f"{source} adapts {name}, a layer of {(lora_b[name].shape[0], a.shape[1])} outputs and inputs, but "
                f"the model {has}. Load the base model that it was trained on."
            )
    held = {key.removeprefix("base_model.model."): tensor for key, tensor in heads_of(state).items()}
    owned: set[str] = set()
    for head in declared:
        wrapped = [name for name in modules if name.endswith(head)]  # PEFT's rule
        inside = {name for name in held if any(name.startswith(f"{module}.") for module in wrapped)}
        own = {name for name in parameters if any(name.startswith(f"{module}.") for module in wrapped)}
        if inside and any(f"{layer}.".startswith(f"{module}.") for module in wrapped for layer in lora_b):
            raise ValueError(f"{source}: the declared head {head!r} holds layers that the adapter adapts.")
        missing = ", ".join(sorted(own - inside - buffers))
        if inside and missing:
            raise ValueError(f"{source} lacks {missing:.300} of the declared head {head!r}.")
        owned |= inside
    for name, tensor in held.items():
        if name not in owned:
            raise ValueError(
                f"{source} holds {name}, which is neither a LoRA factor nor part of a declared head "
                f"({', '.join(declared) or 'none'}). It is not loaded: it would replace weights of "
                "the base model."
            )
        expected = parameters.get(name)
        if expected and name.rpartition(".")[0] == labels[0]:
            expected = (labels[1], *expected[1:])
        if expected != tuple(tensor.shape):
            has = f"one of shape {parameters[name]}" if name in parameters else "none of that name"
            raise ValueError(
                f"{source} holds {name} of shape {tuple(tensor.shape)}, but the model has {has}. Load the base model "
                "that it was trained on, with as many labels."
            )


def fitting_task_type(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The configuration without a task type by which PEFT's wrapper could not call the model."""
    architecture = type(model).__name__
    kinds = next((kinds for end, kinds in _TASK_TYPES.items() if architecture.endswith(end)), None)
    if kinds is not None and config.task_type not in kinds:
        config.task_type = None
    return config


def config_of(file: AdapterFile, state: AdapterState) -> LoraConfig:
    """
    The configuration of an adapter as its tensors need it. Of the file come the task type and the names of heads, if
    the tensors have any of them.
    """
    held = heads_of(state)
    used = [name for name in file.modules_to_save or [] if any(f"{name}." in key for key in held)]
    return exact_config(state, file.task_type, used)


def readable_targets(config: LoraConfig, file: AdapterFile) -> LoraConfig:
    """The configuration with the short names of layers that the file has, where they are names and no more."""
    names = file.target_modules if isinstance(file.target_modules, list) else []
    plain = all(isinstance(name, str) and _NAME.fullmatch(name) for name in names)
    if names and plain and not file.exclude_modules:
        config.target_modules = set(names)
    return config


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the names that they have without PEFT's wrappers."""
    named = model.named_modules(remove_duplicate=False)
    return {_unwrapped(name): module for name, module in named if ".modules_to_save" not in name}


def _parameters(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes by the names that parameters and buffers have without PEFT's wrappers; tied ones under all of them."""
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        _unwrapped(name): tuple(tensor.shape)
        for name, tensor in own
        if ".lora_" not in name and ".modules_to_save." not in name
    }


def _buffers(model: nn.Module) -> set[str]:
    """Names of buffers, which an adapter may have or not."""
    return {_unwrapped(name) for name, _ in model.named_buffers(remove_duplicate=False)}


def _unwrapped(name: str) -> str:
    return re.sub(r"\.base_layer|\.original_module", "", name)


def _shape(module: nn.Module | None) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear layer, `None` of all else."""
    if isinstance(module, nn.Linear):  # those of bitsandbytes are
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return None
