"""A whole training step: forward, backward, optimizer. What our constraint adds to plain LoRA under fused AdamW."""

from typing import Any

import torch

from .models import batch_of, constrain, make_llama, with_lora
from .timing import interleaved


def measure_training(size: str, rank: int, columns: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """
    The overhead is taken from the parts, since the whole varies by more than it: the same forward and backward pass,
    and the optimizer's step with and without the constraint, in turns.
    """
    precision = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    model = with_lora(make_llama(size, device), rank)
    ids = batch_of(tokens, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = [torch.nn.Parameter(parameter.detach().clone()) for parameter in trained]
    optimizer, other = (torch.optim.AdamW(parameters, lr=1e-4, fused=True) for parameters in (trained, plain))
    constrain(model, optimizer, columns)

    def forward_and_backward() -> None:
        optimizer.zero_grad()
        with precision:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    def copy_gradients() -> None:
        for parameter, copy in zip(trained, plain, strict=True):
            copy.grad = parameter.grad.clone()

    nothing = dict.fromkeys(("model", "plain", "ours"), lambda: None)
    times = interleaved(
        {"model": forward_and_backward, "plain": other.step, "ours": optimizer.step},
        device,
        prepare=nothing | {"plain": copy_gradients},
        seconds=20.0,
    )
    return {
        "what": "training",
        "set": size,
        "rank": rank,
        "basis": columns,
        "tokens": tokens,
        "forward_backward_ms": times["model"],
        "adamw_fused_ms": times["plain"],
        "ours_ms": times["ours"],
        "overhead": (times["ours"] - times["plain"]) / (times["model"] + times["plain"]),
    }
