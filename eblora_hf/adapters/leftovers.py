"""What a run that did not come to its end has left on a model, and how the next one takes it off."""

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .composition import EARLIER_TASKS, activate, adapter_state, load_adapter
from .heads import restore_labels
from .layers import find_layers
from .sharding import whole
from .states import heads_of

_WRAPPED = "_eblora_wrapped"  # on a base model: we have put its LoRA layers there
_UNFINISHED = "_eblora_unfinished"  # on a PeftModel: a run has begun on it and not ended; its heads before that run


def mark_wrapped(base_model: nn.Module) -> None:
    """Says of a model that its LoRA layers are ours, to be taken off when it is given to another trainer."""
    vars(base_model)[_WRAPPED] = True


def unwrapped(base_model: nn.Module) -> nn.Module:
    """
    The model without the LoRA layers that an earlier trainer has put into it, as when a notebook cell runs again. What
    was learnt lies in the published sequence.

    Raises:
        ValueError: if it has LoRA layers that no trainer of ours has put there.
    """
    found = [(name, module) for name, module in base_model.named_modules() if isinstance(module, LoraLayer)]
    if not found and _WRAPPED not in vars(base_model):
        return base_model
    if _WRAPPED not in vars(base_model):
        raise ValueError(
            f"The model has LoRA layers ({found[0][0]} for one) from an earlier `get_peft_model` or `from_pretrained` "
            "of PEFT. Pass that PeftModel, or the model without them: `peft_model.unload()`."
        )
    heads = [(name, module) for name, module in base_model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for name, module in [*found, *heads]:
        parent, _, last = name.rpartition(".")
        inner = module.get_base_layer() if isinstance(module, LoraLayer) else module.original_module
        setattr(base_model.get_submodule(parent), last, inner)
    restore_labels(base_model)
    for attribute in ("peft_config", _WRAPPED):
        vars(base_model).pop(attribute, None)
    return base_model


def begin_run(model: PeftModel, adapter: str) -> None:
    """
    Makes a model what it was before a run that has not ended, and remembers what it is before this one.

    Args:
        model (`PeftModel`): The model.
        adapter (`str`): The adapter that is trained.
    """
    heads = vars(model).get(_UNFINISHED)
    if heads is None:
        before = heads_of(adapter_state(model, adapter))
        vars(model)[_UNFINISHED] = {key: whole(x).detach().to("cpu", copy=True) for key, x in before.items()}
    else:
        take_off_unfinished(model, adapter)


@torch.no_grad()
def take_off_unfinished(model: PeftModel, adapter: str) -> None:
    """Takes off what a run that has not ended has left: earlier tasks, the update of a task, its trained heads."""
    heads = vars(model).get(_UNFINISHED)
    if heads is None:
        return
    if EARLIER_TASKS in model.peft_config:
        model.delete_adapter(EARLIER_TASKS)
    activate(model, adapter)
    load_adapter(model, adapter, heads)
    for layer in find_layers(model, adapter):
        layer.lora_B.zero_()


def trained_adapter(model: PeftModel) -> str | None:
    """The adapter that is trained: the only active one beside the earlier tasks of an unfinished run, if it is one."""
    active = [name for name in model.active_adapters if name != EARLIER_TASKS or _UNFINISHED not in vars(model)]
    return active[0] if len(active) == 1 else None


def end_run(model: PeftModel) -> None:
    """Says that a run has come to its end: what is on the model now is what was asked for."""
    vars(model).pop(_UNFINISHED, None)
