"""The snapshot of a task: extra peak memory over the adapted weights, and time over a plain training pass."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from eblora_hf.adapters.layers import find_layers
from eblora_hf.memory.accumulators import Storage
from eblora_hf.memory.gradients import mean_gradients
from eblora_hf.memory.moments import token_gradient_moments

from .models import batch_of, make_llama, with_lora
from .timing import in_own_process, wait

MODES = {
    "gradients": (mean_gradients, Storage()),
    "gradients, sketch of 64": (mean_gradients, Storage(sketch=64)),
    "gradients, on the CPU": (mean_gradients, Storage(offload=True)),
    "token gradients": (token_gradient_moments, Storage()),
    "token gradients, sketch of 256": (token_gradient_moments, Storage(sketch=256)),
    "token gradients, on the CPU": (token_gradient_moments, Storage(offload=True)),
}
_BLOCKS, _TOKENS, _BATCHES = 4, 128, 3


def measure_snapshot(size: str, mode: str, device: torch.device) -> dict[str, Any]:
    """In a process of its own, because the peak of a process never falls again."""
    return in_own_process("speed.snapshot", size, mode, str(device))


def _measure(size: str, mode: str, device: torch.device) -> dict[str, Any]:
    collect, storage = MODES[mode]
    model = with_lora(make_llama(size, device, layers=_BLOCKS), 16)
    layers = find_layers(model, "default")
    weights = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    batches = [{"input_ids": (ids := batch_of(_TOKENS, device)), "labels": ids} for _ in range(_BATCHES)]

    def loss(model: torch.nn.Module, batch: dict) -> torch.Tensor:
        return model(**batch).loss

    plain = []  # of training LoRA, whose activations are not the snapshot's
    for batch in batches:
        wait(device)
        started = time.perf_counter()
        loss(model, batch).backward()
        wait(device)
        plain.append(time.perf_counter() - started)
    model.zero_grad()
    before = peak_memory(device, reset=True)
    started = time.perf_counter()
    collect(model, layers, [(batch, 1) for batch in batches], loss, storage)
    wait(device)
    elapsed = time.perf_counter() - started
    return {
        "what": "snapshot",
        "set": size,
        "mode": mode,
        "memory_over_weights": (peak_memory(device) - before) / weights,
        "time_over_training_pass": elapsed / (_BATCHES * sorted(plain)[_BATCHES // 2]),
    }


def peak_memory(device: torch.device, reset: bool = False) -> int:
    """Bytes at the highest so far; on the CPU with `reset` those in use now, since its peak cannot be set back."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident memory becomes what it is now
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(json.dumps(_measure(sys.argv[1], sys.argv[2], torch.device(sys.argv[3]))))
