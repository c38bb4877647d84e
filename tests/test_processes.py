"""Two real processes (gloo) train what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eblora_hf import PublishedSequence

ROOT = Path(__file__).parents[1]


def launch(folder: Path, processes: int, per_device: int, method: str) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    script = str(ROOT / "tests" / "launch" / "two_tasks.py")
    python = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    python += [] if processes == 1 else [f"--nproc_per_node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*python, script, str(folder), str(per_device), method],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eblora", "keeplora", "olora", "osf"])
def test_two_processes_hold_the_same_and_equal_one(tmp_path, method):
    """
    Adapters, constraints and bases bit for bit on both ranks; the same updates as one process with the same batch.
    """
    launch(tmp_path / "one", 1, 8, method)
    first, second = launch(tmp_path / "two", 2, 4, method)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any("lora_B" in key for key in first)
    assert PublishedSequence.open(tmp_path / "two" / "out").names == ["one", "two"]
    one, two = (load_file(tmp_path / name / "out" / "adapter_model.safetensors") for name in ("one", "two"))
    for key in (key for key in one if "lora_A" in key):
        deltas = [adapter[key.replace("lora_A", "lora_B")] @ adapter[key] for adapter in (one, two)]
        assert (deltas[0] - deltas[1]).norm() <= 1e-2 * deltas[0].norm()
