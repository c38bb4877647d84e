"""SIGKILL at random moments of a three-task run with pushes, then the same again until it is done: nothing is lost."""

import functools
import os
import random
import signal
import time

import pytest
import tenacity
import torch
from safetensors.torch import load_file

from eblora_hf import ContinualEBLoRATrainer, PublishedSequence
from eblora_hf.published import requests

from ..support import HUB_PORT
from ..support.children import run_in_child
from ..support.hub_server import TOKEN, HubServer
from ..support.tiny import accuracy, lora, make_arguments, make_model, make_text_data

TASKS = ("one", "two", "three")


def train(folder, repo_id: str) -> None:
    """The command: the same one whether it is the first time or the twentieth."""
    data = {name: make_text_data("bert", seed=i) for i, name in enumerate(TASKS)}
    trainer = ContinualEBLoRATrainer(
        model=make_model("bert", dropout=0.1),
        args=make_arguments(
            folder, save_strategy="steps", save_steps=1, push_to_hub=True, hub_model_id=repo_id, save_total_limit=2
        ),
        peft_config=lora(task_type="SEQ_CLS", lora_dropout=0.1),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=(folder / "checkpoints").exists())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_twenty_times_equals_undisturbed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(requests._retry, "wait", tenacity.wait_none())
    moments, kills, completed = random.Random(0), 0, 0
    with HubServer(HUB_PORT) as server:
        start = time.monotonic()
        assert run_in_child(lambda: train(tmp_path / "whole", "me/whole")) == 0
        duration = time.monotonic() - start
        while kills < 20:
            folder, repo_id = tmp_path / f"killed-{completed}", f"me/killed-{completed}"
            command = functools.partial(train, folder, repo_id)
            while status := run_in_child(command, kill_after=moments.uniform(0.02, 0.5) * duration):
                assert os.WIFSIGNALED(status), "the command failed instead of being killed"
                assert os.WTERMSIG(status) == signal.SIGKILL
                kills += 1
                if PublishedSequence.exists(folder):
                    PublishedSequence.open(folder, repair=True)  # never a broken sequence
            completed += 1
            check_equal(tmp_path / "whole", folder)
            whole, killed = server.repos["me/whole"], server.repos[repo_id]
            assert set(killed.tags) == set(whole.tags) == {f"task-{i:02d}-{name}" for i, name in enumerate(TASKS)}
            assert [commit.title for commit in killed.history("main")] == [c.title for c in whole.history("main")]
            for name, data in whole.resolve("main").files.items():
                if name.endswith(".safetensors"):
                    assert killed.resolve("main").files[name] == data, name
    assert kills >= 20


def check_equal(whole, killed) -> None:
    """Adapters, bases and matrix, bit for bit."""
    one, two = PublishedSequence.open(whole), PublishedSequence.open(killed)
    assert [task.metrics for task in one.tasks] == [task.metrics for task in two.tasks]
    for task in one.tasks:
        for name in ("adapter_model.safetensors", "subspace.safetensors"):
            a, b = (load_file(folder / task.folder / name) for folder in (whole, killed))
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a), (task.name, name)
    assert (whole / "adapter_model.safetensors").read_bytes() == (killed / "adapter_model.safetensors").read_bytes()
