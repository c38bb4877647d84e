"""What earlier tasks cost a training step as a sequence grows: merged into float32 weights, or as a frozen adapter."""

from typing import Any

import torch

from eblora_hf.adapters.earlier_tasks import EarlierTasks
from eblora_hf.adapters.layers import AdaptedLayer, find_layers
from eblora_hf.adapters.states import AdapterState

from .models import batch_of, make_llama, with_lora
from .timing import interleaved, orthonormal

FORMS = {"merged": EarlierTasks(True, 0.0), "adapter": EarlierTasks(False, 0.0), "error 0.3": EarlierTasks(False, 0.3)}


def measure_sequence(size: str, rank: int, tasks: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """Forward and backward pass of LoRA while task number `tasks` + 1 is learnt, over that of the first task."""
    model = with_lora(make_llama(size, device), rank)
    ids = batch_of(tokens, device)

    def forward_and_backward(model: torch.nn.Module) -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    contenders, layers = {"first": lambda: forward_and_backward(model)}, find_layers(model, "default")
    state = _earlier(layers, rank, tasks)
    records = {}
    for name, form in FORMS.items():
        other = with_lora(make_llama(size, device), rank)
        records[name] = EarlierTasks(form.merge, form.error).put(other, find_layers(other, "default"), state)
        contenders[name] = lambda other=other: forward_and_backward(other)
    times = interleaved(contenders, device, seconds=25.0)
    row = {"what": "sequence", "set": size, "rank": rank, "tasks": tasks, "tokens": tokens}
    row |= {f"{name}_over_first": times[name] / times["first"] for name in FORMS}
    return row | {"rank_of_adapter": records["adapter"]["rank"], "rank_with_error": records["error 0.3"]["rank"]}


def _earlier(layers: list[AdaptedLayer], rank: int, tasks: int) -> AdapterState:
    """Random updates as EBLoRA makes them: equal singular values, directions of their own."""
    torch.manual_seed(1)
    state = {}
    for layer in layers:
        device, key = torch.device("cpu"), f"base_model.model.{layer.name}"
        us = [orthonormal(layer.d_out, rank, device) for _ in range(tasks)]
        vs = [orthonormal(layer.d_in, rank, device).mT for _ in range(tasks)]
        state[f"{key}.lora_A.weight"] = torch.cat(vs, dim=0)
        state[f"{key}.lora_B.weight"] = 0.05 * torch.cat(us, dim=1)
    return state
