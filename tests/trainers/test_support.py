"""Models x trainers x precisions x launchers: what works, and what is refused with which reason (docs/support.md)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..launch.fsdp2 import FSDP2OnCPU
from ..support.architectures import ARCHITECTURES
from ..support.contract import AUTOCAST, PRECISIONS, keep_contract, load, trainer_class, trainer_options
from ..support.tables import PATH, ROWS, TABLES, WORKS, outcome, read, report

ROOT = Path(__file__).parents[2]
LAUNCHERS = ["python", "torchrun", "FSDP2", "FSDP1", "DeepSpeed"]
CELLS = [(model, precision) for model in ARCHITECTURES for precision in PRECISIONS]
# a cross of them always, and the rest with `-m slow`
SOME_FAST = [
    pytest.param(*cell, marks=[] if "Llama" in cell or "float32" in cell else pytest.mark.slow) for cell in CELLS
]


class FSDP1OnCPU(FSDP2OnCPU):
    version = 1


@pytest.mark.parametrize(("model", "precision"), SOME_FAST)
def test_one_process(tmp_path, record_property, model, precision):
    result = outcome(lambda: keep_contract(model, precision, tmp_path))
    report(record_property, TABLES["python"], ROWS[model], precision, result)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What became of all cells under a launcher, run once in two processes."""
    results: dict[str, dict[str, str]] = {}

    def run(launcher: str) -> dict[str, str]:
        if launcher not in results:
            folder = tmp_path_factory.mktemp(launcher)
            options = json.dumps({"folder": str(folder), "launcher": launcher, "cells": CELLS})
            script = str(ROOT / "tests" / "launch" / "contract.py")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            subprocess.run([*command, options], env=environment, capture_output=True, check=False, timeout=1500)
            results[launcher] = json.loads((folder / "results.json").read_text())
        return results[launcher]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "FSDP2"])
@pytest.mark.parametrize(("model", "precision"), CELLS)
def test_two_processes(launched, record_property, launcher, model, precision):
    result = launched(launcher)[f"{model} | {precision}"]
    assert "Traceback" not in result, result
    report(record_property, TABLES[launcher], ROWS[model], precision, result)


def construct(launcher: str, model: str, precision: str, folder: Path, **arguments) -> None:
    """A trainer. DeepSpeed need not be installed to be refused: its configuration is put into finished arguments."""
    architecture = ARCHITECTURES[model]
    before = {"FSDP1": (FSDP1OnCPU,), "FSDP2": (FSDP2OnCPU,)}.get(launcher, ())
    options = trainer_options(architecture, folder, **arguments)
    if launcher == "DeepSpeed":
        options["args"].deepspeed = {"zero_optimization": {"stage": 1 + len(model) % 3}}
    base = load(architecture, precision, folder / "base")
    trainer_class(architecture, before)(model=base, peft_config=architecture.peft_config(), **options)


@pytest.mark.parametrize("launcher", ["FSDP1", "DeepSpeed"])
@pytest.mark.parametrize(("model", "precision"), SOME_FAST)
def test_refused_at_construction(tmp_path, record_property, launcher, model, precision):
    result = outcome(lambda: construct(launcher, model, precision, tmp_path, **AUTOCAST.get(precision, {})))
    assert result != WORKS
    assert launcher == "DeepSpeed" or model == "Mixtral, experts" or "FSDP version 1" in result
    assert not (tmp_path / "out" / "checkpoints").exists()
    report(record_property, TABLES[launcher], ROWS[model], precision, result)


@pytest.mark.skipif(not PATH.is_file(), reason="docs/support.md is being written")
def test_the_document_is_complete():
    """Nothing but the kinds of cells there are, and as many as there are combinations."""
    cells = read()
    for table in (TABLES[launcher] for launcher in LAUNCHERS):
        for row in ROWS.values():
            assert {cells[table, row, precision] for precision in PRECISIONS} <= {WORKS, "refused"}
