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


def launch(folder: Path, processes: int, per_device: int) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    script = str(ROOT / "tests" / "launch" / "two_tasks.py")
    python = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    python += [] if processes == 1 else [f"--nproc_per_node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*python, script, str(folder), str(per_device)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_hold_the_same_and_equal_one(tmp_path):
    """
    Factors and bases bit for bit on both ranks; the same subspaces and updates as one process with the same batch.
    """
    (single,) = launch(tmp_path / "one", 1, 8)
    first, second = launch(tmp_path / "two", 2, 4)
    assert first.keys() == second.keys() == single.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert PublishedSequence.open(tmp_path / "two" / "out").names == ["one", "two"]
    for key in [key for key in single if key.endswith(".U")]:
        name = key.removesuffix(".U")
        one, two = (s[f"{name}.s"] * s[key] @ s[f"{name}.V"].T for s in (single, first))
        torch.testing.assert_close(two, one, atol=1e-4, rtol=0)
