"""A learning rate of the heads' own."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from eblora_hf import EBLoRAConfig, Task, TaskSequence
from eblora_hf.manifold.optimizers import set_learning_rate

from ..support.tiny import lora, make_model, make_text_data
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


def test_a_run_goes_on_with_the_rate_that_it_had(tmp_path):
    options = {"peft_config": HEADS, "save_strategy": "steps", "save_steps": 2}
    own = {"eblora_config": EBLoRAConfig(head_learning_rate=2e-2)}
    with pytest.raises(InterruptionError):
        make_trainer(tmp_path, callbacks=[InterruptAt("one", 3)], **options, **own).train()
    with pytest.raises(ValueError, match=r"with the method 'eblora with head_learning_rate=0\.02', not with 'eblora'"):
        make_trainer(tmp_path, **options).train(resume_from_checkpoint=True)
    make_trainer(tmp_path, **options, **own).train(resume_from_checkpoint=True)


def test_an_optimizer_that_had_a_scheduler_before(tmp_path):
    """Its groups say where that one began: the new scheduler takes the rate of the head instead."""
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    set_learning_rate(optimizer, weights[1:], 2e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 2e-2]


def test_a_task_may_have_another(tmp_path):
    """For its own training alone; and its record says so."""
    data = {name: make_text_data("bert", seed=i) for i, name in enumerate(("one", "two", "three"))}
    rates = {"one": None, "two": 3e-3, "three": None}
    tasks = TaskSequence([Task(name, rows, head_learning_rate=rates[name]) for name, rows in data.items()])
    seen: list[set[float]] = []

    class Rates(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            seen.append({group["initial_lr"] for group in optimizer.param_groups if group["params"]})

    options = {"peft_config": HEADS, "eblora_config": EBLoRAConfig(head_learning_rate=2e-2)}
    make_trainer(tmp_path, train_dataset=tasks, callbacks=[Rates()], **options).train()
    assert seen == [{5e-3, 2e-2}, {5e-3, 3e-3}, {5e-3, 2e-2}]
    records = [json.loads(path.read_text())["task"] for path in sorted(tmp_path.glob("tasks/*/training.json"))]
    assert [record.get("head_learning_rate") for record in records] == [None, 3e-3, None]
    with pytest.raises(ValueError, match=r"head_learning_rate=0\.003 of Task\('two'\).*no trained head"):
        make_trainer(tmp_path / "none", kind="llama", train_dataset=tasks)


def test_a_task_with_a_rate_of_its_own_resumes_to_the_same_bits(tmp_path):
    data = {name: make_text_data("bert", seed=i) for i, name in enumerate(("one", "two"))}
    options = {
        "peft_config": HEADS,
        "eblora_config": EBLoRAConfig(head_learning_rate=2e-2),
        "save_strategy": "steps",
        "save_steps": 2,
    }

    def trainer(folder, **further):
        tasks = TaskSequence([Task("one", data["one"]), Task("two", data["two"], head_learning_rate=3e-3)])
        return make_trainer(folder, train_dataset=tasks, **options, **further)

    trainer(tmp_path / "whole").train()
    with pytest.raises(InterruptionError):
        trainer(tmp_path / "parts", callbacks=[InterruptAt("two", 3)]).train()
    trainer(tmp_path / "parts").train(resume_from_checkpoint=True)
    assert_same_files(load_published(tmp_path / "whole"), load_published(tmp_path / "parts"))


def test_what_cannot_have_it_is_refused_before_anything_is_trained(tmp_path):
    config = EBLoRAConfig(head_learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"head_learning_rate=0\.001.*no trained head.*modules_to_save"):
        make_trainer(tmp_path, kind="llama", eblora_config=config)
    model = get_peft_model(make_model("bert"), HEADS)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match=r"head_learning_rate=0\.001.*scheduler of your own"):
        make_trainer(
            tmp_path,
            tasks=("one",),
            model=model,
            peft_config=None,
            eblora_config=config,
            optimizers=(optimizer, scheduler),
        )
    with pytest.raises(ValueError, match=r"head_learning_rate=-1.*positive"):
        EBLoRAConfig(head_learning_rate=-1)
    assert not list(tmp_path.glob("tasks/*"))
