"""A basis from the last steps of training: what is summed up, when it is not enough, and that resuming is exact."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback
from transformers.utils import logging

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig, PublishedSequence
from eblora_hf.memory import observation
from eblora_hf.memory.accumulators import MomentSketch, Storage
from eblora_hf.memory.sketch import Sketch
from eblora_hf.trainers.observing import ObservingMixin

from ..support.tiny import accuracy, lora, make_model, make_text_data
from ..support.trainers import InterruptAt, InterruptionError, assert_same_files, load_published, make_trainer

CONFIG = EBLoRAConfig(observe_steps=0.5, snapshot_samples=1, basis_dtype="float32")


class Recording(ContinualEBLoRATrainer):
    """Keeps what enters each layer and the gradient at its output, by hooks of its own, for every pass."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.passes = vars(self).get("passes", [])
        self.passes.append({})

        def hook(layer):
            def see(module, arguments, output):
                output.register_hook(
                    lambda gradient: self.passes[-1].__setitem__(
                        layer.name, (arguments[0].detach().clone(), gradient.clone(), num_items_in_batch)
                    )
                )

            return see

        handles = [layer.module.register_forward_hook(hook(layer)) for layer in self.layers]
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            for handle in handles:
                handle.remove()

    def observed(self):
        self.moments = super().observed()
        return self.moments


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_moments_are_those_of_the_gradients_of_sums(tmp_path, monkeypatch, kind, accumulation):
    """K ∝ Σ ‖c δ‖² x xᵀ over the last half of the steps, c the items of the step; ten rows in batches of four."""
    monkeypatch.setattr(observation, "_TOKENS_PER_INPUT", 1e9)  # all of them
    trainer = make_trainer(
        tmp_path,
        kind,
        tasks=("one",),
        cls=Recording,
        eblora_config=CONFIG,
        gradient_accumulation_steps=accumulation,
        train_dataset={"one": make_text_data(kind, size=10)},
    )
    trainer.train()
    passes = trainer.passes[-len(trainer.passes) // 2 :]
    steps = 6 // 2
    # an epoch of three batches ends with a step of what is left
    assert len(passes) == steps * accumulation
    for name, moments in trainer.moments.items():
        expected, outputs, count = 0.0, 0.0, 0.0
        for seen in passes:
            x, gradient, items = seen[name]
            weights = (float(items) * gradient.double()).norm(dim=-1, keepdim=True)
            weighted = (x.double() * weights).flatten(0, -2)
            expected = expected + weighted.T @ weighted
            rows = (float(items) * gradient.double()).flatten(0, -2)
            outputs = outputs + rows.T @ rows
            count += float(items) / accumulation if accumulation > 1 else float(items)
        expected /= expected.trace()
        moment = moments.inputs
        torch.testing.assert_close(moment.double() / moment.double().trace(), expected, atol=1e-6, rtol=1e-4)
        seen = moments.outputs
        energy = seen.energy if isinstance(seen, Sketch) else seen.trace().item()
        assert energy * count == pytest.approx(outputs.trace().item(), rel=1e-3)


def test_hooks_are_there_in_the_last_steps_alone(tmp_path):
    counts = []

    class Counting(ContinualEBLoRATrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                counts.append(sum(len(layer.module._forward_hooks) for layer in self.layers) > 0)
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = make_trainer(tmp_path, cls=Counting, tasks=("one",), max_steps=10)
    trainer.train()
    assert counts == [False] * 5 + [True] * 5  # 64 samples would take more, and half of the steps is the most
    assert not any(module._forward_hooks for module in trainer.model.modules())


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}])
def test_training_is_what_it_is_without(tmp_path, options):
    """Observing changes no parameter and draws no random number."""
    runs = []
    for observe in (0.5, 0.0):
        config = EBLoRAConfig(observe_steps=observe)
        trainer = make_trainer(
            tmp_path / str(observe),
            tasks=("one",),
            eblora_config=config,
            model=make_model("bert", dropout=0.1),
            **options,
        )
        trainer.train()
        runs.append(load_published(tmp_path / str(observe))["root"])
    assert_same_files({"root": runs[0]}, {"root": runs[1]})


@pytest.mark.parametrize("step", [4, 5, 6])
def test_resumed_within_the_observed_steps(tmp_path, step):
    options = {"save_strategy": "steps", "save_steps": 1, "eblora_config": CONFIG}
    make_trainer(tmp_path / "whole", **options).train()
    with pytest.raises(InterruptionError):
        make_trainer(tmp_path / "parts", callbacks=[InterruptAt("two", step)], **options).train()
    held = [path.name for path in (tmp_path / "parts/checkpoints/two").glob("*/eblora_observed-0-of-1.safetensors")]
    assert len(held) == step - 4  # from the fourth step of six on, and the one of this step is not written yet
    make_trainer(tmp_path / "parts", **options).train(resume_from_checkpoint=True)
    assert_same_files(load_published(tmp_path / "parts"), load_published(tmp_path / "whole"))


@pytest.mark.parametrize("step", [4, 5, 6])
def test_resumed_where_an_epoch_ends_with_a_part_of_a_step(tmp_path, step):
    """Three batches an epoch in steps of two: as many tokens of a pass are taken, whichever pass comes first."""
    options = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eblora_config": CONFIG,
        "gradient_accumulation_steps": 2,
        "tasks": ("one",),
        "train_dataset": {"one": make_text_data("bert", size=10)},
    }
    make_trainer(tmp_path / "whole", **options).train()
    with pytest.raises(InterruptionError):
        make_trainer(tmp_path / "parts", callbacks=[InterruptAt("one", step)], **options).train()
    make_trainer(tmp_path / "parts", **options).train(resume_from_checkpoint=True)
    assert_same_files(load_published(tmp_path / "parts"), load_published(tmp_path / "whole"))


def test_sums_of_more_processes_than_there_are_now(tmp_path):
    """A run of one process goes on from what two have summed up: nothing is lost, nothing counts twice."""
    options = {"save_strategy": "steps", "save_steps": 1, "eblora_config": CONFIG}
    make_trainer(tmp_path / "whole", **options).train()
    with pytest.raises(InterruptionError):
        make_trainer(tmp_path / "parts", callbacks=[InterruptAt("two", 6)], **options).train()
    folder = tmp_path / "parts/checkpoints/two/checkpoint-5"
    whole = load_file(folder / "eblora_observed-0-of-1.safetensors")
    (folder / "eblora_observed-0-of-1.safetensors").unlink()
    for rank, share in enumerate((0.25, 0.75)):
        state = {key: value * share if value.is_floating_point() else value for key, value in whole.items()}
        state |= {key: value // 2 for key, value in whole.items() if key.endswith(".tokens")}
        save_file(state, folder / f"eblora_observed-{rank}-of-2.safetensors")
    make_trainer(tmp_path / "parts", **options).train(resume_from_checkpoint=True)
    one, two = (PublishedSequence.open(tmp_path / name).bases() for name in ("whole", "parts"))
    for name in one:
        torch.testing.assert_close(two[name] @ two[name].T, one[name] @ one[name].T, atol=1e-4, rtol=0)


def test_a_process_more_than_before_has_no_sums_and_knows_the_steps(tmp_path):
    """Or it would find too little observed where the others find enough, and wait for them for ever."""
    save_file({"steps": torch.tensor(3), "x.0": torch.ones(2)}, tmp_path / "eblora_observed-0-of-1.safetensors")

    def load(remembers):
        for index in range(2):
            mixin = ObservingMixin()
            mixin.args = SimpleNamespace(process_index=index, world_size=2)
            mixin.method = SimpleNamespace(remembers=remembers)
            mixin.load_observation(str(tmp_path))
            yield mixin._observed_before

    held = list(load("token-gradients"))
    assert [steps for steps, _ in held] == [3, 3]
    assert [len(states) for _, states in held] == [1, 0]
    # it has seen nothing of the outputs, which the penalty needs: on no process it counts as observed
    assert list(load("curvature")) == [None, None]


# ---- where too little was observed ----


def with_warning(caplog, trainer, **train):
    caplog.clear()
    trainer.train(**train)
    return [record.getMessage() for record in caplog.records if "a snapshot of it is taken" in record.getMessage()]


@pytest.fixture
def log(caplog):
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def test_an_early_stop_before_the_observed_steps(tmp_path, log):
    options = {
        "tasks": ("one",),
        "max_steps": 20,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "compute_metrics": accuracy,
        "eval_dataset": {"one": make_text_data("bert")},
        "callbacks": [EarlyStoppingCallback(1, early_stopping_threshold=10.0)],
    }
    (message,) = with_warning(log, make_trainer(tmp_path, **options))
    assert "0 of 10 steps were observed" in message
    assert PublishedSequence.open(tmp_path).tasks[0].has_basis


def test_the_best_weights_are_of_an_earlier_step(tmp_path, log):
    first = iter([1.0, *[0.0] * 50])
    options = {
        "tasks": ("one",),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "compute_metrics": lambda prediction: {"accuracy": next(first)},
        "eval_dataset": {"one": make_text_data("bert")},
    }
    (message,) = with_warning(log, make_trainer(tmp_path, **options))
    assert "the best weights are those of step 1" in message


def test_resumed_at_the_last_step_without_what_was_observed(tmp_path, log):
    options = {"save_strategy": "steps", "save_steps": 1, "tasks": ("one",)}
    with pytest.raises(InterruptionError):
        make_trainer(tmp_path, callbacks=[InterruptAt("one", 6)], **options).train()
    for file in tmp_path.glob("checkpoints/one/*/eblora_observed-*"):
        file.unlink()
    (message,) = with_warning(log, make_trainer(tmp_path, **options), resume_from_checkpoint=True)
    assert "1 of 3 steps were observed" in message


def test_a_truncated_file_is_named(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "tasks": ("one",)}
    with pytest.raises(InterruptionError):
        make_trainer(tmp_path, callbacks=[InterruptAt("one", 6)], **options).train()
    file = tmp_path / "checkpoints/one/checkpoint-5/eblora_observed-0-of-1.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"eblora_observed-0-of-1\.safetensors is damaged .*resume from an earlier"):
        make_trainer(tmp_path, **options).train(resume_from_checkpoint=True)
    shutil.rmtree(file.parent)
    make_trainer(tmp_path, **options).train(resume_from_checkpoint=True)


def test_a_zero_learning_rate_is_observed_as_well(tmp_path):
    """Weights that do not move have gradients all the same."""
    trainer = make_trainer(tmp_path, cls=Recording, tasks=("one",), lr_scheduler_type="linear", warmup_steps=1)
    trainer.train()
    assert trainer.moments is not None


# ---- sketches ----


def test_observed_sketches_leave_out_what_earlier_tasks_hold(tmp_path, monkeypatch):
    """The second task's columns and the energy they hold are those of whole moments, to what a sketch may miss."""
    results = []
    for sketched in (False, True):
        with monkeypatch.context() as patch:
            if sketched:
                patch.setattr(
                    "eblora_hf.trainers.observing.choose_storage", lambda *args, **kwargs: Storage(sketch=30)
                )
                patch.setattr(Storage, "moment", lambda self, d, basis=None: MomentSketch(self, d, basis))
            config = EBLoRAConfig(energy_threshold=0.8, basis_dtype="float32")
            make_trainer(tmp_path / str(sketched), eblora_config=config, peft_config=lora(r=2)).train()
        results.append(PublishedSequence.open(tmp_path / str(sketched)))
    whole, sketched = (sequence.bases() for sequence in results)
    for name, basis in sketched.items():
        assert (basis.T @ basis - torch.eye(basis.shape[1])).abs().max() < 2e-6
        assert abs(basis.shape[1] - whole[name].shape[1]) <= 4
