"""A learning rate of the heads' own."""

import pytest
import torch
from transformers import TrainerCallback

from eblora_hf import EBLoRAConfig

from ..support.tiny import lora
from ..support.trainers import InterruptAt, InterruptionError, assert_same_files, load_published, make_trainer

RATES = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
HEADS = lora(modules_to_save=["classifier"], exclude_modules=["classifier"])


class Groups(TrainerCallback):
    """The groups of the optimizer: initial and acting learning rates, and the decay of those at the head's rate."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.begun = {(group["initial_lr"], group["lr"]) for group in optimizer.param_groups if group["params"]}
        self.decay = {group["weight_decay"] for group in optimizer.param_groups if group["initial_lr"] == 2e-2}

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        self.ended = {(group["initial_lr"], group["lr"]) for group in optimizer.param_groups if group["params"]}


def moved(trainer) -> dict[str, float]:
    """How far the largest entry of each trained parameter has moved."""
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    return {
        name: (value.detach() - before[name]).abs().max().item()
        for name, value in trainer.model.named_parameters()
        if value.requires_grad
    }


@pytest.mark.parametrize(("rate", "expected"), [(None, 1e-3), (2e-2, 2e-2)])
def test_the_first_step_of_adam_is_as_long_as_the_rate(tmp_path, rate, expected):
    options = {"peft_config": HEADS, "tasks": ("one",), "max_steps": 1, "save_strategy": "steps", **RATES}
    config = EBLoRAConfig(method="lora", head_learning_rate=rate)
    lengths = moved(make_trainer(tmp_path, eblora_config=config, **options))
    heads = {name: length for name, length in lengths.items() if "classifier" in name}
    assert len(heads) == 2
    assert all(length == pytest.approx(expected, rel=1e-3) for length in heads.values())
    others = {name: length for name, length in lengths.items() if ".lora_B." in name}
    assert others
    assert max(others.values()) == pytest.approx(1e-3, rel=1e-2), others


@pytest.mark.parametrize("method", ["eblora", "lora"])
def test_it_follows_the_schedule_and_resumes_to_the_same_bits(tmp_path, method):
    options = {
        "peft_config": HEADS,
        "eblora_config": EBLoRAConfig(method=method, head_learning_rate=2e-2),
        "weight_decay": 0.1,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    seen = Groups()
    make_trainer(tmp_path / "whole", callbacks=[seen], **options).train()
    assert seen.begun == {(5e-3, 5e-3), (2e-2, 2e-2)}
    assert seen.ended == {(5e-3, 0.0), (2e-2, 0.0)}  # the linear schedule has ended for all of them
    assert seen.decay == {0.1, 0.0}  # of the weight of the head and of its bias
    with pytest.raises(InterruptionError):
        make_trainer(tmp_path / "parts", callbacks=[InterruptAt("two", 3)], **options).train()
    make_trainer(tmp_path / "parts", **options).train(resume_from_checkpoint=True)
    assert_same_files(load_published(tmp_path / "whole"), load_published(tmp_path / "parts"))


def test_without_a_head_it_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, kind="llama", eblora_config=EBLoRAConfig(head_learning_rate=1e-3))
    with pytest.raises(ValueError, match=r"head_learning_rate=0\.001.*no trained head.*modules_to_save"):
        trainer.train()
    with pytest.raises(ValueError, match=r"head_learning_rate=-1.*positive"):
        EBLoRAConfig(head_learning_rate=-1)
    assert not list(tmp_path.glob("tasks/*"))
    assert torch.is_grad_enabled()
