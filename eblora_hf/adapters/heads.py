"""The heads of a model: modules that are trained whole beside LoRA (PEFT's `modules_to_save`), and their labels."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from .states import AdapterState

_PREFIX = "base_model.model."
_LABELS = "_eblora_labels"  # on a base model whose labels we have changed: those that it came with


def wrapped_heads(model: PeftModel) -> dict[str, ModulesToSaveWrapper]:
    """PEFT's wrappers of heads by their names in the base model."""
    named = model.get_base_model().named_modules()
    return {name: module for name, module in named if isinstance(module, ModulesToSaveWrapper)}


def trained_heads(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of heads that are trained, by name."""
    named = model.named_parameters()
    return {name: weight for name, weight in named if ".modules_to_save." in name and weight.requires_grad}


def label_layer(base_model: nn.Module, heads: Sequence[str]) -> str | None:
    """
    Name of the linear layer among the heads that has an output for each label, `None` if there is none.

    Args:
        base_model (`nn.Module`): The model, with or without PEFT's wrappers.
        heads (`list[str]`): The `modules_to_save`.
    """
    labels = getattr(getattr(base_model, "config", None), "num_labels", None)
    labels = len(vars(base_model)[_LABELS][0]) if _LABELS in vars(base_model) else labels
    found = None
    for name, module in base_model.named_modules():
        name = name.replace(".original_module", "")
        inside = any(f".{head}." in f".{name}." for head in heads)
        if inside and ".modules_to_save" not in name and isinstance(module, nn.Linear):
            found = name if module.out_features == labels else found  # the last one
    return found


def find_heads(base_model: nn.Module) -> list[str]:
    """
    The modules that a model for classification or question answering has on top of its pre-trained part.

    They are the children of a model that are no `PreTrainedModel` of their own: `classifier`, `score`,
    `pre_classifier`, `qa_outputs`, `projector`…
    """
    if not type(base_model).__name__.endswith(("Classification", "QuestionAnswering", "MultipleChoice")):
        return []
    return [
        name
        for name, child in base_model.named_children()
        if not isinstance(child, PreTrainedModel)
        and name != getattr(base_model, "base_model_prefix", None)
        and any(True for _ in child.parameters())
    ]


def pretrained_part(base_model: nn.Module, heads: Sequence[str]) -> nn.Module | None:
    """
    What of a model comes below its heads: its `base_model_prefix`, or else its only other child with parameters.

    Args:
        base_model (`nn.Module`): The model, with or without PEFT's wrappers.
        heads (`list[str]`): The `modules_to_save`.

    Returns:
        `nn.Module`; `None` where that does not tell.
    """
    named = getattr(base_model, getattr(base_model, "base_model_prefix", ""), None)
    if isinstance(named, nn.Module):
        return named
    tops = {head.partition(".")[0] for head in heads}
    others = [
        child
        for name, child in base_model.named_children()
        if name not in tops and next(child.parameters(), None) is not None
    ]
    return others[0] if len(others) == 1 else None


def has_fresh_head(base_model: nn.Module) -> bool:
    """Whether a model was loaded from the checkpoint of another class, so that its head was drawn at random."""
    trained_as = getattr(getattr(base_model, "config", None), "architectures", None) or []
    return bool(trained_as) and type(base_model).__name__ not in trained_as


def fit_rows(head: nn.Module, state: AdapterState) -> None:
    """
    Gives the linear layers of a head as many rows as a state has, by new parameters whose values mean nothing.

    Args:
        head (`nn.Module`): The head.
        state (`dict[str, torch.Tensor]`): Its state dict, of which rows may be more or fewer.
    """
    for name, layer in head.named_modules():
        weight = state.get(f"{name}.weight" if name else "weight")
        if isinstance(layer, nn.Linear) and weight is not None and len(weight) != layer.out_features:
            for kind, parameter in list(layer.named_parameters(recurse=False)):
                fresh = parameter.detach().new_zeros(len(weight), *parameter.shape[1:])
                setattr(layer, kind, nn.Parameter(fresh, requires_grad=parameter.requires_grad))
            layer.out_features = len(weight)


def state_of_head(name: str, heads: AdapterState) -> AdapterState:
    """The state dict of one head, out of tensors by PEFT's file names."""
    prefix = f"{_PREFIX}{name}."
    return {key.removeprefix(prefix): value for key, value in heads.items() if key.startswith(prefix)}


def load_heads(model: PeftModel, adapter: str, heads: AdapterState) -> None:
    """Loads heads, of whatever number of labels, into the wrappers' entries under the name of an adapter."""
    for name, wrapper in wrapped_heads(model).items():
        state = state_of_head(name, heads)
        if state and adapter in wrapper.modules_to_save:
            fit_rows(wrapper.modules_to_save[adapter], state)
            wrapper.modules_to_save[adapter].load_state_dict(state, strict=False)


@contextlib.contextmanager
def other_heads(model: PeftModel, adapter: str, heads: AdapterState) -> Iterator[None]:
    """Within the context copies of the heads with other values, and other numbers of labels, are in their places."""
    wrappers = [wrapper for wrapper in wrapped_heads(model).values() if adapter in wrapper.modules_to_save]
    before = [wrapper.modules_to_save[adapter] for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.modules_to_save[adapter] = copy.deepcopy(wrapper.modules_to_save[adapter])
        load_heads(model, adapter, heads)
        yield
    finally:
        for wrapper, head in zip(wrappers, before, strict=True):
            wrapper.modules_to_save[adapter] = head


def original_heads(model: PeftModel) -> AdapterState:
    """The heads that the base model came with, by PEFT's file names."""
    return {
        f"{_PREFIX}{name}.{key}": value.detach()
        for name, wrapper in wrapped_heads(model).items()
        for key, value in wrapper.original_module.state_dict().items()
    }


def without_rows(state: AdapterState, layer: str) -> AdapterState:
    """The state of heads whose label layer has no label."""
    own = (f"{_PREFIX}{layer}.weight", f"{_PREFIX}{layer}.bias")
    return {key: value[:0] if key in own else value for key, value in state.items()}


def with_fresh_rows(state: AdapterState, layer: str, rows: int, std: float, seed: int) -> AdapterState:
    """
    The state of heads whose label layer has more rows: the first ones as they are, the others drawn.

    Args:
        state (`dict[str, torch.Tensor]`): By PEFT's file names.
        layer (`str`): Name of the label layer.
        rows (`int`): How many labels there are.
        std (`float`): Standard deviation of the new weights; new biases are zero.
        seed (`int`): Of the draw.
    """
    generator, result = torch.Generator().manual_seed(seed), dict(state)
    for kind in ("weight", "bias"):
        old = state.get(f"{_PREFIX}{layer}.{kind}")
        if old is not None:
            fresh = torch.zeros(rows - len(old), *old.shape[1:])
            fresh = fresh.normal_(0.0, std, generator=generator) if kind == "weight" else fresh
            result[f"{_PREFIX}{layer}.{kind}"] = torch.cat([old, fresh.to(old)])
    return result


def keep_rows(optimizer: torch.optim.Optimizer, layer: nn.Module, rows: int) -> None:
    """
    Has the first rows of a label layer stay what they are, whatever the optimizer does.

    Args:
        optimizer (`torch.optim.Optimizer`): It holds the layer's parameters.
        layer (`nn.Module`): The label layer, `(labels, d_in)`.
        rows (`int`): How many.
    """
    kept = [(parameter, parameter.detach()[:rows].clone()) for parameter in layer.parameters()]

    def without_gradient(gradient: torch.Tensor) -> torch.Tensor:  # clipping and the logged norm see the others alone
        return torch.cat([torch.zeros_like(gradient[:rows]), gradient[rows:]])

    @torch.no_grad()
    def put_back(*_: object) -> None:  # decay and moments know no gradient of zero
        for parameter, values in kept:
            parameter[:rows] = values

    for parameter, _ in kept:
        parameter.register_hook(without_gradient)
    optimizer.register_step_post_hook(put_back)


def name_labels(base_model: Any, labels: Sequence[str]) -> None:
    """Has a model know its labels by number and name; [`restore_labels`] undoes it."""
    config = base_model.config
    vars(base_model).setdefault(_LABELS, (config.id2label, config.label2id))
    _set_labels(base_model, dict(enumerate(labels)), {label: index for index, label in enumerate(labels)})


def restore_labels(base_model: Any) -> None:
    """Gives a model the labels back that it came with."""
    before = vars(base_model).pop(_LABELS, None)
    if before is not None:
        _set_labels(base_model, *before)


def _set_labels(base_model: Any, id2label: dict[int, str], label2id: dict[str, int]) -> None:
    base_model.config.id2label, base_model.config.label2id = id2label, label2id
    if hasattr(base_model, "num_labels"):  # a copy, which the loss goes by
        base_model.num_labels = len(id2label)
