"""Which adapters act while a task is learnt, whoever switches them: earlier tasks stay on, and `disable_adapter()` is
the model before the task.

PEFT keeps on every layer which adapters are active. `set_adapter` from a callback would drop earlier tasks that lie
beside the weights, and `disable_adapter`, by which TRL gets its reference, would drop or keep them depending on the
precision of the weights. So a run answers both calls itself, and looks before every step.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .composition import EARLIER_TASKS, activate
from .heads import load_heads, wrapped_heads
from .layers import AdaptedLayer
from .states import AdapterState

_WITHIN = "_eblora_within"  # on a PeftModel: how many of the contexts below it is in
_HEAD_BEFORE = "head_before_the_task"  # beside the trained one in each wrapper of a head


def hold_switches(model: PeftModel, adapter: str) -> None:
    """Has `model.disable_adapter` and `model.set_adapter` mean what they mean during a task, until they are freed."""
    vars(model)["disable_adapter"] = partial(before_task, model)
    vars(model)["set_adapter"] = partial(_set_adapter, model)
    activate(model, adapter)


def free_switches(model: PeftModel) -> None:
    """Gives PEFT's own methods back."""
    for name in ("disable_adapter", "set_adapter", _WITHIN):
        vars(model).pop(name, None)
    keep_heads_before(model, {})


def _set_adapter(model: PeftModel, adapter_name: str, inference_mode: bool = False) -> None:
    """`PeftModel.set_adapter`, with the earlier tasks beside whatever is set."""
    PeftModel.set_adapter(model, adapter_name, inference_mode)
    if EARLIER_TASKS in model.peft_config and adapter_name != EARLIER_TASKS:
        activate(model, adapter_name)
        if inference_mode:
            model.set_requires_grad(adapter_name, False)


@contextlib.contextmanager
def before_task(model: PeftModel) -> Iterator[None]:
    """Within the context the model is what it was before the task: earlier tasks with their head, and nothing else."""
    with _as_it_was(model):
        for module in _switchable(model):
            if isinstance(module, ModulesToSaveWrapper) and _HEAD_BEFORE in module.modules_to_save:
                module.set_adapter(_HEAD_BEFORE)
            elif isinstance(module, BaseTunerLayer) and EARLIER_TASKS in module._all_available_adapter_names():
                module.set_adapter([EARLIER_TASKS])
            else:
                module.enable_adapters(False)
        yield


@contextlib.contextmanager
def pretrained(model: PeftModel) -> Iterator[None]:
    """Within the context no adapter acts. Tasks that were merged into the weights are still in them."""
    with _as_it_was(model):
        for module in _switchable(model):
            module.enable_adapters(False)
        yield


@contextlib.contextmanager
def _as_it_was(model: PeftModel) -> Iterator[None]:
    """Leaves which adapters act, and which parameters are trained, as they were; PEFT trains all that is active."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = [(module, list(module.active_adapters), module.disable_adapters) for module in _switchable(model)]
    within = vars(model).get(_WITHIN, 0)
    vars(model)[_WITHIN] = within + 1
    try:
        yield
    finally:
        vars(model)[_WITHIN] = within
        for module, active, disabled in before:
            module.enable_adapters(not disabled)
            module.set_adapter(active if isinstance(module, BaseTunerLayer) or not active else active[0])
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def acts(model: PeftModel, layers: list[AdaptedLayer]) -> bool:
    """Whether the adapter of these layers is active and trained, and beside it the frozen earlier tasks alone."""
    earlier = EARLIER_TASKS in model.peft_config
    for layer in layers:
        module = layer.module
        if module.disable_adapters or module.active_adapters != [layer.adapter, EARLIER_TASKS][: 1 + earlier]:
            return False
        if not layer.lora_B.requires_grad or (earlier and module.lora_B[EARLIER_TASKS].weight.requires_grad):
            return False
    return True


def is_switched_by_us(model: PeftModel) -> bool:
    """Whether the model is within [`before_task`] or [`pretrained`]."""
    return vars(model).get(_WITHIN, 0) > 0


def switch_back(model: PeftModel, adapter: str) -> None:
    """Makes the adapter active and trained again, with the frozen earlier tasks beside it."""
    vars(model).pop(_WITHIN, None)  # of a context that nobody has left
    for module in _switchable(model):
        module.enable_adapters(True)
    activate(model, adapter)


def keep_heads_before(model: PeftModel, heads: AdapterState) -> None:
    """
    Keeps the `modules_to_save` that the model had before a task, for [`before_task`]; none if `heads` is empty.

    Args:
        model (`PeftModel`): The model. On one that FSDP2 shards nothing is kept: it would not know the new parameters.
        heads (`dict[str, torch.Tensor]`): By PEFT's file names.
    """
    for wrapper in wrapped_heads(model).values():
        if _HEAD_BEFORE in wrapper.modules_to_save:
            wrapper.modules_to_save.pop(_HEAD_BEFORE)
        if heads:
            wrapper.update(_HEAD_BEFORE)
            wrapper.modules_to_save[_HEAD_BEFORE].requires_grad_(False)
    load_heads(model, _HEAD_BEFORE, heads)


def _switchable(model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
