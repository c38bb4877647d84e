"""What `eblora estimate` says against what a small model really takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from eblora_hf import EBLoRAConfig, PublishedSequence
from eblora_hf.analysis.cost import estimate_cost
from eblora_hf.memory.accumulators import Storage

from ..support.tiny import lora, make_model
from ..support.trainers import make_trainer

SMALL = transformers.LlamaConfig(
    vocab_size=300,
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=2,
    num_attention_heads=4,
    architectures=["LlamaForCausalLM"],
)


def sizes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def test_a_trained_sequence_takes_what_was_estimated(tmp_path):
    """Weights, adapter, optimizer, bases in memory and on disk, the whole sequence and the rank of its root: 15 %."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(SMALL)
    options = EBLoRAConfig(energy_threshold=0.99999, basis_budget=1.0)
    trainer = make_trainer(
        tmp_path, "llama", ("one", "two", "three"), model=model, peft_config=lora(r=8), eblora_config=options
    )
    kept = {}
    finish = trainer._leave_training

    def leave(task):
        kept["moments"] = sum(
            value.numel() * value.element_size()
            for state in trainer.optimizer.optimizer.state.values()
            for value in state.values()
            if value.ndim
        )
        factors = trainer.constraint.factors().values()
        kept["masters"] = sum(4 * (x.U.numel() + x.V.numel()) for x in factors)
        kept["bases"] = sum(4 * x.numel() for x in trainer.constraint.bases.values())
        curvatures = trainer.begun.curvatures.values()
        kept["bases"] += sum(4 * (x.inputs.numel() + x.outputs.numel()) for x in curvatures)
        return finish(task)

    trainer._leave_training = leave
    trainer.train()
    cost = estimate_cost(SMALL, lora(r=8), options, tasks=3, dtype="float32")
    near = {"rel": 0.15}
    assert cost.weights == pytest.approx(sum(4 * p.numel() for p in transformers.LlamaForCausalLM(SMALL).parameters()))
    assert cost.optimizer == pytest.approx(kept["moments"] + kept["masters"], **near)
    assert cost.bases == pytest.approx(kept["bases"], **near)
    assert cost.earlier_tasks == 0  # merged into float32
    assert cost.task_adapter == pytest.approx(sizes(tmp_path, "tasks/00-one/adapter_model.safetensors"), **near)
    assert cost.task_bases == pytest.approx(sizes(tmp_path, "tasks/00-one/subspace.safetensors"), **near)
    assert cost.disk == pytest.approx(sizes(tmp_path, "**/*.safetensors"), **near)
    root = PublishedSequence.open(tmp_path)
    assert cost.root_rank == sum(task.rank for task in root.tasks) == 24
    assert cost.layers == len(trainer.layers) == 14


def test_heads_dtypes_and_gpus(tmp_path):
    config = make_model("bert").config
    config.architectures = ["BertForSequenceClassification"]
    options = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    with_head, without = (
        estimate_cost(config, lora(**(options | extra))) for extra in ({}, {"modules_to_save": None})
    )
    classifier = sum(4 * p.numel() for p in make_model("bert").classifier.parameters())
    assert with_head.task_adapter - without.task_adapter == classifier
    whole, quantized = (estimate_cost(SMALL, lora(), dtype=dtype) for dtype in ("float32", "4-bit"))
    assert whole.weights > 2 * quantized.weights
    halved = estimate_cost(SMALL, lora(), dtype="float32", gpus=2, sharded=True)
    assert halved.weights == pytest.approx(whole.weights / 2)
    assert estimate_cost(SMALL, lora(), dtype="float32", gpus=2).weights == whole.weights


def test_of_seven_billion_parameters():
    """By shapes: the peak of a snapshot is a quarter of the weights at most, a task's bases four times its adapter."""
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"])  # whose defaults are those of the 7B model
    cost = estimate_cost(config, lora(r=16), tasks=10)
    assert cost.weights == pytest.approx(2 * 6.738e9, rel=1e-3)
    assert cost.snapshot <= 0.25 * cost.weights
    assert cost.task_bases <= 4 * cost.task_adapter
    assert cost.root_rank == 160


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dtype": "int8"}, r"dtype='int8': expected one of float32, bfloat16, 4-bit"),
        ({"tasks": 0}, r"tasks=0, gpus=1: expected positive"),
        ({"options": EBLoRAConfig(method="osf")}, r"method='osf': the ranks of its adapters are those of the weights"),
        (
            {"config": transformers.LlamaConfig(architectures=["BertForSequenceClassification"])},
            r"does not fit the class BertForSequenceClassification",
        ),
        ({"config": transformers.LlamaConfig()}, r"names no class of transformers in `architectures`, got \[\]"),
    ],
)
def test_wrong_arguments(wrong, words):
    with pytest.raises(ValueError, match=words):
        estimate_cost(**({"config": SMALL, "lora": lora()} | wrong))


def test_options_count():
    sketched = estimate_cost(SMALL, lora(), EBLoRAConfig(snapshot_sketch=4))
    assert sketched.snapshot < estimate_cost(SMALL, lora()).snapshot
    assert estimate_cost(SMALL, lora(), EBLoRAConfig(snapshot_offload=True)).snapshot == 0
    beside = estimate_cost(SMALL, lora(), EBLoRAConfig(method="olora"), tasks=3, dtype="float32")
    assert beside.earlier_tasks == 2 * beside.task_adapter
    assert estimate_cost(SMALL, lora(r=200), tasks=3).task_bases >= 0


def test_the_command(tmp_path):
    SMALL.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"architectures": ["LlamaForCausalLM"]}))
    command = [sys.executable, "-c", "from eblora_hf.cli import app; app()", "estimate"]
    result = subprocess.run([*command, str(tmp_path), "--tasks", "3", "--rank", "8"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "rank of the root adapter: 24, adapted layers: 14" in result.stdout
    assert "the sequence of 3 tasks, at most" in result.stdout
    wrong = subprocess.run([*command, str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1].startswith("Error: ") or "Error: " in wrong.stderr


def test_default_storage_of_a_trainer_is_that_of_the_estimate(tmp_path):
    assert make_trainer(tmp_path).storage_of("token-gradients") == Storage()
