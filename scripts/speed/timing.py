"""Interleaved timing, the layer sets, and what machine it was."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_LLAMA_1B = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]
_LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
SETS = {  # (d_out, d_in) of the adapted layers of a block, and the number of blocks
    "tiny": ([(48, 32), (32, 48)], 2),
    "vit": ([(768, 768)] * 4, 12),
    "1b": (_LLAMA_1B, 16),
    "7b": (_LLAMA_7B, 32),
}


def shapes_of(name: str, device: torch.device) -> list[tuple[int, int]]:
    """The layers of a set; of the 7B one on a CPU an eighth, which keeps every ratio and fits the memory."""
    block, count = SETS[name]
    return block * (4 if name == "7b" and device.type == "cpu" else count)


def interleaved(
    contenders: dict[str, Callable[[], Any]],
    device: torch.device,
    *,
    prepare: dict[str, Callable[[], Any]] | None = None,
    seconds: float = 8.0,
    at_most: int = 25,
) -> dict[str, float]:
    """
    Median time of each contender in milliseconds, taken in turns so that whatever disturbs a run disturbs all.

    Args:
        contenders (`dict[str, Callable]`): What to time, by name.
        device (`torch.device`): Where it runs; a GPU is waited for.
        prepare (`dict[str, Callable]`, *optional*): What goes before each of its runs, unseen by the clock.
        seconds (`float`), at_most (`int`): Rounds are repeated for so long, at most so many, and at least 3 if those
            take no more than four times as long.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for number in range(at_most + 1):
        for name, contender in contenders.items():
            if prepare:
                prepare[name]()
            wait(device)
            before = time.perf_counter()
            contender()
            wait(device)
            if number > 0:  # the first round allocates
                times[name].append(1e3 * (time.perf_counter() - before))
        if number == 0:
            started = time.perf_counter()
            continue
        elapsed = time.perf_counter() - started
        if (number >= 3 and elapsed > seconds) or elapsed > 4.0 * seconds:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def in_own_process(module: str, *arguments: str) -> dict[str, Any]:
    """The row that a module of this folder prints last, since the peak of a process never falls again."""
    command = [sys.executable, "-m", module, *arguments, str(torch.get_num_threads())]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if result.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def orthonormal(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, device=device)).Q


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers depend on."""
    processor = platform.processor()
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = f"{len(names)} x {names[0]}" if names else processor
    except OSError:
        pass
    described = {"processor": processor, "threads": str(torch.get_num_threads()), "torch": torch.__version__}
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described
