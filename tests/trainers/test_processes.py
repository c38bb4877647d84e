"""Two real processes (gloo) train what one does, whole (DistributedDataParallel) or with half of it each (FSDP2)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from eblora_hf import PublishedSequence

from ..support.tiny import make_model, make_text_data

ROOT = Path(__file__).parents[2]
KINDS = {"DDP": {"processes": 2, "per_device": 4}, "FSDP2": {"processes": 2, "per_device": 4, "shard": True}}
ONE = {"processes": 1, "per_device": 8}

pytestmark = pytest.mark.slow


def start(folder: Path, processes: int, **options) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    python = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    python += [] if processes == 1 else [f"--nproc_per_node={processes}"]
    script = str(ROOT / "tests" / "launch" / "two_tasks.py")
    return subprocess.run(
        [*python, script, json.dumps({"folder": str(folder), "method": "eblora"} | options)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def launch(folder: Path, processes: int, **options) -> list[dict[str, torch.Tensor]]:
    result = start(folder, processes, **options)
    assert result.returncode == 0, result.stderr[-4000:]
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(processes)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What all processes hold after a run of a kind; the same run only once."""
    done = {}

    def get(**options) -> list[dict[str, torch.Tensor]]:
        key = json.dumps(options, sort_keys=True)
        if key not in done:
            done[key] = launch(tmp_path_factory.mktemp("run"), **options)
        return done[key]

    return get


def difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], task: str) -> float:
    """‖ΔW₁ - ΔW₂‖ / ‖ΔW₁‖ over the updates of all layers."""
    apart, size = 0.0, 0.0
    for key in (key for key in one if key.startswith(f"{task}.") and "lora_A" in key):
        first, second = (held[key.replace("lora_A", "lora_B")].double() @ held[key].double() for held in (one, two))
        apart, size = apart + (first - second).square().sum().item(), size + first.square().sum().item()
    assert size > 0.0
    return (apart / size) ** 0.5


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any("lora_B" in key for key in first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fifty_steps_of_each_task(run, kind, dtype):
    """Adapters, constraints and bases bit for bit on both ranks; the updates of one process with the same batch."""
    (one,) = run(**ONE, steps=50, dtype=dtype)
    first, second = run(**KINDS[kind], steps=50, dtype=dtype)
    assert_same(first, second)
    assert any(key.startswith("bases.") for key in first)
    differences = [difference(one, first, task) for task in ("one", "two")]
    if dtype == "float64":
        assert max(differences) <= 1e-12
        return
    (stock_one,), (stock_two, _) = (run(**how, steps=50, stock=True) for how in (ONE, KINDS["DDP"]))
    stock = difference(stock_one, stock_two, "out")
    print(f"{kind}: {differences[0]:.1e} and {differences[1]:.1e}, stock Trainer {stock:.1e}")
    assert differences[0] <= 1e-5
    assert differences[1] <= 1e-4  # the second task starts from what is left of the first one's rounding


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_with_a_rate_of_its_own(run, tmp_path, kind):
    """Groups of the optimizer that were split reach it again where parameters are sharded, and where it is resumed."""
    (one,) = run(**ONE, head_rate=2e-2)
    first, second = run(**KINDS[kind], head_rate=2e-2)
    assert_same(first, second)
    assert difference(one, first, "two") <= 1e-2
    assert difference(first, run(**KINDS[kind], head_rate=1e-4)[0], "two") > 1e-2
    assert start(tmp_path, **KINDS[kind], head_rate=2e-2, interrupt=4).returncode == 0
    resumed, _ = launch(tmp_path, **KINDS[kind], head_rate=2e-2, resume=True)
    assert all(torch.equal(resumed[key], first[key]) for key in resumed)
    assert any(key.startswith("two.") for key in resumed)


def test_sharding_changes_nothing(run):
    """FSDP2 gives the bits of DistributedDataParallel on the first task, before earlier tasks take another form."""
    whole, sharded = (run(**KINDS[kind], steps=50, dtype="float32")[0] for kind in ("DDP", "FSDP2"))
    keys = [key for key in whole if key.startswith("one.")]
    assert keys
    assert all(torch.equal(whole[key], sharded[key]) for key in keys)


@pytest.mark.parametrize(
    ("method", "kind"),
    [*((method, "DDP") for method in ("keeplora", "olora", "osf")), ("ebo", "FSDP2"), ("lora", "FSDP2")],
)
def test_other_methods(run, method, kind):
    (one,) = run(**ONE, method=method)
    first, second = run(**KINDS[kind], method=method)
    assert_same(first, second)
    assert difference(one, first, "two") <= 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_equals_uninterrupted(run, tmp_path, kind):
    """Killed in the middle of the second task, whose checkpoint is of the first process and of the shards."""
    first, _ = run(**KINDS[kind])
    assert start(tmp_path, **KINDS[kind], interrupt=4).returncode == 0
    assert not (tmp_path / "rank0.safetensors").exists()
    resumed, other = launch(tmp_path, **KINDS[kind], resume=True)
    assert_same(resumed, other)
    assert all(torch.equal(resumed[key], first[key]) for key in resumed)
    assert any(key.startswith("two.") for key in resumed)


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_while_a_basis_is_observed(run, tmp_path, kind):
    """Every process goes on from what it has summed up; both hold the same bases, about as wide as those of one."""
    (one,) = run(**ONE, observe=True)
    first, second = run(**KINDS[kind], observe=True)
    assert_same(first, second)
    assert start(tmp_path, **KINDS[kind], observe=True, interrupt=8).returncode == 0
    held = sorted(path.name for path in tmp_path.glob("out/checkpoints/two/checkpoint-8/eblora_observed-*"))
    assert held == ["eblora_observed-0-of-2.safetensors", "eblora_observed-1-of-2.safetensors"]
    resumed, other = launch(tmp_path, **KINDS[kind], observe=True, resume=True)
    assert_same(resumed, other)
    assert all(torch.equal(resumed[key], first[key]) for key in resumed)
    for key in (key for key in one if key.startswith("bases.")):
        assert abs(first[key].shape[1] - one[key].shape[1]) <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_an_anchor(run, tmp_path, kind):
    """Its rows are shared out: the updates of one process with as many, the same bits when it is resumed."""
    (one,) = run(**ONE, anchor=8, dtype="float64")
    (without,) = run(**ONE, dtype="float64")
    first, second = run(**KINDS[kind], anchor=4, dtype="float64")
    assert_same(first, second)
    assert max(difference(one, first, task) for task in ("one", "two")) <= 1e-11
    assert min(difference(one, without, task) for task in ("one", "two")) >= 1e-4
    assert start(tmp_path, **KINDS[kind], anchor=4, dtype="float64", interrupt=4).returncode == 0
    resumed, other = launch(tmp_path, **KINDS[kind], anchor=4, dtype="float64", resume=True)
    assert_same(resumed, other)
    assert all(torch.equal(resumed[key], first[key]) for key in resumed)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_first_process_saves_loads_in_stock_peft(tmp_path, kind):
    launch(tmp_path, **KINDS[kind], best=True)
    assert PublishedSequence.open(tmp_path / "out").names == ["one", "two"]
    inputs = make_text_data("llama", seed=9)[:4]
    outputs = []
    for folder in ("out", "saved"):
        model = PeftModel.from_pretrained(make_model("llama"), tmp_path / folder).eval()
        outputs.append(model(**inputs).logits)
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], make_model("llama").eval()(**inputs).logits, atol=1e-5)


def test_sharded_heads_are_saved_whole_by_one_process(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests" / "launch" / "heads.py")
    result = subprocess.run(
        [*command, script, str(tmp_path)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]


def test_every_sample_of_a_snapshot_counts_once(run):
    """Five batches for two processes; both tasks' bases come from all of them."""
    (one,) = run(processes=1, per_device=4, rows=20, steps=1, dtype="float64", method="inflora")
    first, second = run(**KINDS["DDP"], rows=20, steps=1, dtype="float64", method="inflora")
    assert_same(first, second)
    name = next(key for key in one if key.startswith("bases.") and "layers.0" in key and "q_proj" in key)
    mine, theirs = one[name].double(), first[name].double()  # before training moves anything, the inputs are the same
    torch.testing.assert_close(mine @ mine.T, theirs @ theirs.T, atol=1e-6, rtol=0)


def test_processes_that_come_apart_are_stopped(tmp_path):
    result = start(tmp_path, **KINDS["DDP"], drift=True)
    assert result.returncode != 0
    assert "hold different values of 1 tensors" in result.stderr
    assert "mlp.up_proj.lora_B.weight" in result.stderr
    assert not (tmp_path / "out" / "eblora_sequence.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_differ_from_the_start(tmp_path, kind):
    """DistributedDataParallel takes the first process's; FSDP2 would shard a mixture."""
    result = start(tmp_path, **KINDS[kind], unseeded=True)
    if kind == "DDP":
        assert result.returncode == 0, result.stderr[-2000:]
        assert_same(*(load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)))
    else:
        assert result.returncode != 0
        assert "Do all load the same model" in result.stderr


@pytest.mark.parametrize("heads", ["per-task", "grow"])
def test_heads_of_the_tasks_own(tmp_path, heads):
    """Two processes learn and measure what one does."""
    script = str(ROOT / "tests" / "launch" / "own_heads.py")
    for processes in (1, 2):
        options = json.dumps({"folder": str(tmp_path / str(processes)), "heads": heads, "per_device": 8 // processes})
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [*command, script, options], env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert result.returncode == 0, result.stderr[-4000:]
    one, two = (PublishedSequence.open(tmp_path / str(processes)) for processes in (1, 2))
    assert one.names == two.names == ["t0", "t1", "t2"]
    for first, second in zip(one.adapters(), two.adapters(), strict=True):
        for key in (key for key in first if "classifier" in key):
            torch.testing.assert_close(first[key], second[key], atol=5e-3, rtol=0)  # AdamW moves it by up to 0.04
    for first, second in zip(one.tasks, two.tasks, strict=True):
        assert first.metrics == pytest.approx(second.metrics, abs=0.05)
