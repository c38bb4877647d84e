"""Several tasks' updates on one model, exactly: folded scaling, concatenation, one frozen adapter of all earlier
tasks.

An adapter is a state dict by PEFT's file names (`base_model.model.<layer>.lora_A.weight`). Published ones are
*folded*: B carries the scaling γ and `lora_alpha = r`, so ΔW = B A whatever the adapter was trained with. The sum of
updates is then their concatenation, A stacked along its rows and B along its columns, without rounding.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers.utils import logging

from .factors import Factors, decompose_product
from .heads import fit_rows, other_heads, state_of_head, wrapped_heads
from .layers import AdaptedLayer, find_layers
from .sharding import is_sharded, scatter, trains_shards, whole
from .states import AdapterState, factor_key, factors_of, folded_config, heads_of, ranked_config, target_exactly

logger = logging.get_logger(__name__)

EARLIER_TASKS = "earlier_tasks"


def folded_adapter(
    model: PeftModel, layers: list[AdaptedLayer], factors: dict[str, Factors] | None = None
) -> AdapterState:
    """
    The adapter of `layers` with the scaling folded into lora_B, and its `modules_to_save`, on the CPU.

    Args:
        model (`PeftModel`): The model.
        layers (`list[AdaptedLayer]`): The layers of one adapter.
        factors (`dict[str, Factors]`, *optional*): Masters of a constraint by layer name, to take instead of
            parameters that may have rounded them.

    Returns:
        `dict[str, torch.Tensor]`: By PEFT's file names.
    """
    state = {key: whole(value) for key, value in adapter_state(model, layers[0].adapter).items()}
    for layer in layers:
        a, b = (factor_key(layer.name, kind) for kind in ("lora_A", "lora_B"))
        if factors:
            state[a], state[b] = factors[layer.name].V.mT, factors[layer.name].s * factors[layer.name].U
        else:
            state[b] = state[b] * layer.scaling
        used = state[a].any(dim=1)  # a direction whose row of A is zero holds nothing
        if not used.all():
            used[0] = True  # PEFT wants a rank of at least one
            state[a], state[b] = state[a][used], state[b][:, used]
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}


def adapter_state(model: PeftModel, adapter: str) -> AdapterState:
    """
    The tensors of an adapter as they are, sharded if the model's are: its factors and `modules_to_save`.

    PEFT would add the base weights of embeddings and of an output layer with LoRA on it, which are no part of it.
    """
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def concatenate(adapters: list[AdapterState]) -> AdapterState:
    """
    The exact sum of folded adapters as one adapter; `modules_to_save` are the last one's.

    Raises:
        ValueError: if the adapters are of different layers.

    Example:

    >>> key = "base_model.model.layer.lora_{}.weight"
    >>> one = {key.format("A"): torch.ones(2, 8), key.format("B"): torch.ones(4, 2)}
    >>> {name: tuple(tensor.shape) for name, tensor in concatenate([one, one, one]).items()}
    {'base_model.model.layer.lora_A.weight': (6, 8), 'base_model.model.layer.lora_B.weight': (4, 6)}
    """
    first, result = adapters[0], dict(adapters[-1])
    for index, adapter in enumerate(adapters):
        difference = set(factors_of(first, "lora_A")) ^ set(factors_of(adapter, "lora_A"))
        if difference:
            raise ValueError(
                f"The tasks of a sequence must adapt the same layers, but task 0 and task {index} differ in "
                f"{', '.join(sorted(difference))}. Use the `target_modules` of the earlier tasks."
            )
    for kind, dim in (("lora_A", 0), ("lora_B", 1)):
        for name in factors_of(first, kind):
            key = factor_key(name, kind)
            sizes = {adapter[key].shape[1 - dim] for adapter in adapters}
            if len(sizes) > 1:
                raise ValueError(
                    f"The tasks of a sequence must adapt the same layers, but {kind} of {name} has "
                    f"{' and '.join(map(str, sorted(sizes)))} {'rows' if dim else 'columns'} in different tasks."
                )
            result[key] = torch.cat([adapter[key] for adapter in adapters], dim=dim)
    return result


def compress(adapter: AdapterState, error: float) -> tuple[AdapterState, float]:
    """
    The folded adapter of lowest rank within a relative error of each layer's update.

    Args:
        adapter (`dict[str, torch.Tensor]`): Folded adapter, usually a concatenation.
        error (`float`): What ‖ΔW - ΔW̃‖ / ‖ΔW‖ may be in the Frobenius norm, in [0, 1).

    Returns:
        `tuple` of the adapter, in the dtype it had, and the largest error of a layer.
    """
    result, worst = dict(adapter), 0.0
    for name, a in factors_of(adapter, "lora_A").items():
        key_a, key_b = (factor_key(name, kind) for kind in ("lora_A", "lora_B"))
        left, sigma, right = decompose_product(adapter[key_b], a)
        # lost[k] is the share of the energy that is lost with k directions
        lost = 1.0 - torch.cat([sigma.new_zeros(1), sigma.square().cumsum(0)]) / sigma.square().sum().clamp_min(1e-300)
        kept = max(int((lost > error**2).sum()), 1)
        root = sigma[:kept].sqrt()
        result[key_a] = (root.unsqueeze(-1) * right[:kept]).to(a.dtype).contiguous()
        result[key_b] = (left[:, :kept] * root).to(a.dtype).contiguous()
        worst = max(worst, lost[kept].clamp_min(0.0).sqrt().item())
    return result, worst


def put_earlier_tasks(model: PeftModel, adapter: str, earlier: AdapterState) -> None:
    """
    Puts the earlier tasks beside a trainable adapter as one frozen adapter; both are active.

    Args:
        model (`PeftModel`): The model.
        adapter (`str`): The trainable adapter. It owns the `modules_to_save` and takes over their values.
        earlier (`dict[str, torch.Tensor]`): Folded adapter, usually a concatenation.
    """
    if EARLIER_TASKS in model.peft_config:
        model.delete_adapter(EARLIER_TASKS)
    heads = heads_of(earlier)
    load_adapter(model, adapter, heads)
    earlier = {key: value for key, value in earlier.items() if key not in heads}
    config = folded_config(model.peft_config[adapter], earlier)
    config.modules_to_save = None  # one owner of the head among the active adapters
    target_exactly(config, factors_of(earlier, "lora_A"))
    # not model.add_adapter: task-specific classes would add their head to the configuration
    PeftModel.add_adapter(model, EARLIER_TASKS, config)
    load_adapter(model, EARLIER_TASKS, earlier)
    activate(model, adapter)


def current_weight(layer: AdaptedLayer) -> torch.Tensor:
    """The weight that a task finds, `(d_out, d_in)` in float32 or wider: the base model's with all earlier tasks."""
    weight = layer.dense_weight()
    if EARLIER_TASKS in layer.module.lora_A:
        weight = weight + layer.oriented(layer.module.get_delta_weight(EARLIER_TASKS).detach())
    return weight


def set_ranks(model: PeftModel, adapter: str, ranks: dict[str, int]) -> None:
    """
    Replaces a trainable adapter by a fresh one of other ranks and scaling 1; its `modules_to_save` keep their values.

    Args:
        model (`PeftModel`): The model.
        adapter (`str`): Name of the adapter.
        ranks (`dict[str, int]`): The rank by layer name.
    """
    heads = heads_of(adapter_state(model, adapter))
    heads = {key: value.detach().clone() for key, value in heads.items()}
    _renew(model, adapter, ranked_config(model.peft_config[adapter], ranks))
    load_adapter(model, adapter, heads)
    activate(model, adapter)


def activate(model: PeftModel, adapter: str) -> None:
    """Makes an adapter active and trainable, and with it the frozen earlier tasks if there are any."""
    if EARLIER_TASKS not in model.peft_config:
        model.set_adapter(adapter)
        return
    # the trainable one first: the Trainer saves and loads the first of several active adapters
    model.base_model.set_adapter([adapter, EARLIER_TASKS])
    model.set_requires_grad(EARLIER_TASKS, False)


def replace_adapter(model: PeftModel, adapter: str, state: AdapterState) -> None:
    """
    Replaces a trained adapter, and the earlier tasks beside it, by one adapter of the same name.

    Args:
        model (`PeftModel`): The model.
        adapter (`str`): Name of the adapter.
        state (`dict[str, torch.Tensor]`): Folded adapter with the `modules_to_save` of the old one, if it had any.
    """
    if EARLIER_TASKS in model.peft_config:
        model.set_adapter(adapter)
        model.delete_adapter(EARLIER_TASKS)
    _renew(model, adapter, folded_config(model.peft_config[adapter], state))
    load_adapter(model, adapter, state)
    model.set_requires_grad(adapter, False)


def _renew(model: PeftModel, adapter: str, config: LoraConfig) -> None:
    """Replaces an adapter by a fresh one, which is then the active one."""
    stand_in = "replaced"  # PEFT wants one adapter to be active at any time
    small = copy.deepcopy(config)
    small.r, small.rank_pattern, small.alpha_pattern, small.modules_to_save = 1, {}, {}, None
    target_exactly(small, [layer.name for layer in find_layers(model, adapter)])
    PeftModel.add_adapter(model, stand_in, small)
    model.set_adapter(stand_in)
    model.delete_adapter(adapter)
    model.add_adapter(adapter, config)
    model.set_adapter(adapter)
    model.delete_adapter(stand_in)


def merge_into_base(model: PeftModel, *, allow_lossy: bool = False) -> nn.Module:
    """
    Merges a model's adapter into the base weights and returns the base model.

    In float32 this is exact up to rounding. Low-precision weights cannot hold a small update on top of themselves:
    entries below half a unit in the last place are lost.

    Args:
        model (`PeftModel`): A model with one active LoRA adapter, as from [`load_sequence`].
        allow_lossy (`bool`, defaults to `False`): Merge into bf16 or fp16 weights all the same, with a warning that
            says how much of the update they keep.

    Returns:
        `nn.Module`: The base model with changed weights.

    Raises:
        ValueError: if the weights are quantized, or of low precision and `allow_lossy` is not set; nothing is changed
            then.
    """
    layers = find_layers(model, model.active_adapters[0])
    quantized = [layer.name for layer in layers if layer.quantized]
    if quantized:
        raise ValueError(
            f"The weights of {len(quantized)} layers are quantized ({quantized[0]}…): their steps are larger than "
            "most updates. Keep the adapter unmerged, or load the base model in float32."
        )
    lossy = [layer for layer in layers if torch.finfo(layer.weight.dtype).bits < 32]
    if lossy:
        kept = [_kept_share(layer) for layer in lossy]
        loss = (
            f"Merging into {lossy[0].weight.dtype} weights keeps {sum(kept) / len(kept):.1%} of the update on "
            f"average, {min(kept):.1%} in the worst of {len(lossy)} layers"
        )
        if not allow_lossy:
            raise ValueError(
                f"{loss}. Keep the adapter unmerged, load the base model in float32, or pass `allow_lossy=True`."
            )
        logger.warning(f"{loss}.")
    return model.merge_and_unload()


def _kept_share(layer: AdaptedLayer) -> float:
    """<round(W + ΔW) - W, ΔW> / ‖ΔW‖², the share of a layer's update that its weights keep."""
    delta = layer.module.get_delta_weight(layer.adapter).float()
    weight = layer.weight.detach()
    change = (weight + delta.to(weight.dtype)).float() - weight.float()
    return ((change * delta).sum() / delta.square().sum().clamp_min(torch.finfo(torch.float32).tiny)).item()


@contextlib.contextmanager
def with_heads(model: PeftModel, adapter: str, heads: AdapterState) -> Iterator[None]:
    """Within the context the adapter has other `modules_to_save`; an empty `heads` changes nothing."""
    if not heads:
        yield
    elif not trains_shards(model):
        with other_heads(model, adapter, heads):
            yield
    else:  # FSDP2 knows these parameters and no other: their values go and come back
        before = heads_of(adapter_state(model, adapter))
        before = {key: whole(value).detach().clone() for key, value in before.items()}
        load_adapter(model, adapter, heads)
        try:
            yield
        finally:
            load_adapter(model, adapter, before)


def load_adapter(model: PeftModel, adapter: str, state: AdapterState) -> None:
    """
    Loads tensors into an adapter, whose heads get as many labels as the tensors have.

    Raises:
        ValueError: if the model has no place for some of them.
    """
    if not state:
        return
    held = adapter_state(model, adapter)
    if any(is_sharded(value) for value in held.values()):
        unexpected = sorted(state.keys() - held.keys())
        for key in state.keys() & held.keys():
            scatter(state[key].to(held[key].device, held[key].dtype).unsqueeze(0), [held[key]])
    else:
        for name, wrapper in wrapped_heads(model).items():
            if adapter in wrapper.modules_to_save:
                fit_rows(wrapper.modules_to_save[adapter], state_of_head(name, state))
        unexpected = set_peft_model_state_dict(model, dict(state), adapter_name=adapter).unexpected_keys
    if unexpected:
        raise ValueError(
            f"The adapter does not fit the model, which has no {', '.join(unexpected)}. Load the base "
            "model and the `target_modules` that it was trained with."
        )
