"""One of two real processes (gloo) fails: all end with the cause, and what was trained is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eblora_hf import PublishedSequence

from ..support.trainers import assert_same_files, load_published

ROOT = Path(__file__).parents[2]
PHASES = ["start snapshot", "step", "end snapshot", "basis", "evaluation", "append", "publish"]
FAST = {("evaluation", 1), ("append", 0)}
CASES = [
    pytest.param(phase, rank, marks=() if (phase, rank) in FAST else pytest.mark.slow)
    for phase in PHASES
    for rank in (0, 1)
]


def start(folder: Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            str(ROOT / "tests" / "launch" / "failing.py"),
            json.dumps({"folder": str(folder)} | options),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=90,  # the start of two processes included
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    result = start(folder)
    assert result.returncode == 0, result.stderr[-4000:]
    return load_published(folder / "out")


@pytest.mark.parametrize(("phase", "rank"), CASES)
def test_a_failure_on_one_process(tmp_path, undisturbed, phase, rank):
    failed = start(tmp_path, phase=phase, rank=rank)
    assert failed.returncode != 0
    assert "on purpose" in failed.stderr
    out = tmp_path / "out"
    published = PublishedSequence.open(out).names
    if phase == "publish" or (phase, rank) == ("append", 1):  # the first process has written it
        assert published == ["one", "two"]
    else:
        assert published == ["one"]
        kept = {path.name for path in (out / "checkpoints/two").glob("checkpoint-*")}
        last = {"start snapshot": None, "step": "checkpoint-2"}.get(phase, "checkpoint-6")
        assert last is None or last in kept
        assert (out / "checkpoints/two/checkpoint-6/eblora_trained.json").exists() == (last == "checkpoint-6")
    resumed = start(tmp_path, resume=True)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert_same_files(load_published(out), undisturbed)


@pytest.mark.slow
def test_a_sequence_that_cannot_be_opened(tmp_path, undisturbed):
    failed = start(tmp_path, phase="opening")
    assert failed.returncode != 0
    assert "Process 0 has failed while opening the sequence: OSError: on purpose" in failed.stderr
    assert start(tmp_path).returncode == 0
    assert_same_files(load_published(tmp_path / "out"), undisturbed)
