"""The end of a training is not the end of a task: what stops it, what fails after it, and what resuming then does."""

import os
import signal
import time

import numpy as np
import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig, PublishedSequence

from ..support.children import run_in_child
from ..support.tiny import accuracy, make_text_data
from ..support.trainers import assert_same_files, load_published, make_trainer

EVALUATION = {name: make_text_data("bert", seed=i + 50) for i, name in enumerate(("one", "two"))}


def trainer_of(folder, **options):
    defaults = {"eval_dataset": EVALUATION, "compute_metrics": accuracy, "max_steps": 8}  # six steps are an epoch
    return make_trainer(folder, **(defaults | options))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer_of(folder).train()
    return load_published(folder)


class CountSteps(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append((os.path.basename(args.output_dir), state.global_step))


# ---- failures after the last step ----


def raises(prediction):
    raise RuntimeError("on purpose")


class UnreadableRow:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise RuntimeError("on purpose")


class FailingCallback(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_evaluate(self, *args, **kwargs):
        raise self.error("on purpose")


class FailingObservation(ContinualEBLoRATrainer):
    """What was observed while the task was trained is taken once it has ended."""

    def observed(self):
        raise RuntimeError("on purpose")


FAILURES = {
    "a metric that raises": {"compute_metrics": raises},
    "a metric that is nothing": {"compute_metrics": lambda prediction: None},
    "a metric that is an array": {"compute_metrics": lambda prediction: np.zeros(3)},
    "a metric that is text": {"compute_metrics": lambda prediction: {"accuracy": "good"}},
    "a set that cannot be read": {"eval_dataset": EVALUATION | {"one": UnreadableRow()}},
    "a callback that raises": {"callbacks": [FailingCallback(RuntimeError)]},
    "Ctrl-C": {"callbacks": [FailingCallback(KeyboardInterrupt)]},
    "what was observed": {"cls": FailingObservation},
}


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_after_the_last_step_keeps_the_task(tmp_path, undisturbed, failure, save_strategy):
    options = {"save_strategy": save_strategy, "save_steps": 3}
    with pytest.raises((Exception, KeyboardInterrupt)) as caught:
        trainer_of(tmp_path, **(options | FAILURES[failure])).train()
    assert not isinstance(caught.value, AssertionError)
    assert (tmp_path / "checkpoints/one/checkpoint-8/eblora_state.safetensors").is_file()
    counter = CountSteps()
    trainer_of(tmp_path, callbacks=[counter], **options).train(resume_from_checkpoint=True)
    assert counter.steps == [("two", step) for step in range(1, 9)]
    assert_same_files(load_published(tmp_path), undisturbed)


@pytest.mark.parametrize("method", ["eblora", "osf"])
def test_a_failed_append_keeps_the_task(tmp_path, monkeypatch, method):
    config = EBLoRAConfig(method=method)
    trainer_of(tmp_path / "whole", eblora_config=config).train()
    with monkeypatch.context() as patch:
        patch.setattr(PublishedSequence, "append", lambda *args, **kwargs: raises(None))
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer_of(tmp_path / "parts", eblora_config=config).train()
    trainer_of(tmp_path / "parts", eblora_config=config).train(resume_from_checkpoint=True)
    assert_same_files(load_published(tmp_path / "parts"), load_published(tmp_path / "whole"))


def test_without_saving_nothing_of_a_published_task_is_kept(tmp_path, undisturbed):
    trainer_of(tmp_path).train()
    assert not list(tmp_path.glob("checkpoints/*/checkpoint-*"))
    assert_same_files(load_published(tmp_path), undisturbed)


# ---- stops before the last step ----


class StopAt(TrainerCallback):
    def __init__(self, task, step):
        self.task, self.step = task, step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = args.output_dir.endswith(self.task) and state.global_step == self.step


@pytest.mark.parametrize("task", ["one", "two"])
@pytest.mark.parametrize("save_strategy", ["no", "epoch"])
def test_a_stop_in_mid_training_publishes_nothing_and_is_resumed(tmp_path, undisturbed, task, save_strategy):
    trainer = trainer_of(tmp_path, save_strategy=save_strategy, callbacks=[StopAt(task, 3)])
    output = trainer.train()
    assert output.global_step == 3 + 8 * (task == "two")
    assert PublishedSequence.exists(tmp_path) == (task == "two")
    counter = CountSteps()
    trainer_of(tmp_path, save_strategy=save_strategy, callbacks=[counter]).train(resume_from_checkpoint=True)
    assert counter.steps[0] == (task, 4)
    assert_same_files(load_published(tmp_path), undisturbed)


def test_early_stopping_is_an_end_and_resuming_trains_no_further(tmp_path):
    def options(**changed):
        stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
        defaults = {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "accuracy",
            "callbacks": [stopping],
        }
        return defaults | changed

    trainer_of(tmp_path / "whole", **options()).train()
    assert [task.steps for task in PublishedSequence.open(tmp_path / "whole").tasks] == [4, 4]
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer_of(tmp_path / "parts", cls=FailingObservation, **options()).train()
    counter = CountSteps()
    resumed = options()
    resumed["callbacks"].append(counter)
    trainer_of(tmp_path / "parts", **resumed).train(resume_from_checkpoint=True)
    assert [step for step in counter.steps if step[0] == "one"] == []
    assert_same_files(load_published(tmp_path / "parts"), load_published(tmp_path / "whole"))


@pytest.mark.parametrize("options", [{"num_train_epochs": 0}, {"num_train_epochs": -1}])
def test_no_step_is_no_task(tmp_path, options):
    with pytest.raises(ValueError, match=r"no training step to take \(num_train_epochs="):
        trainer_of(tmp_path, max_steps=-1, **options).train()
    assert not PublishedSequence.exists(tmp_path)


# ---- SIGTERM ----


class Terminate(TrainerCallback):
    """Sends SIGTERM to its own process, and waits for the parent's grace period to pass."""

    def __init__(self, task, event):
        self.task, self.event = task, event

    def _here(self, event, args):
        if event == self.event and self.task in str(args.output_dir):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3.5 if event == "step" else 0.2)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self._here("step", args)

    def on_prediction_step(self, args, state, control, **kwargs):
        self._here("evaluation", args)


class TerminateInSnapshot(ContinualEBLoRATrainer):
    def snapshot(self, dataset, seed, of="gradients"):
        if seed == self.args.seed + 1 and of == "gradients":  # at the start of the second task
            os.kill(os.getpid(), signal.SIGTERM)
        return super().snapshot(dataset, seed, of)


@pytest.mark.parametrize("phase", ["step of one", "step of two", "snapshot of two", "evaluation"])
def test_sigterm_stops_a_run_that_goes_on_later(tmp_path, undisturbed, silent, phase):
    options = {"enable_jit_checkpoint": True}

    def run():
        changed = {
            "step of one": {"callbacks": [Terminate("checkpoints/one", "step")]},
            "step of two": {"callbacks": [Terminate("checkpoints/two", "step")]},
            "snapshot of two": {"cls": TerminateInSnapshot},
            "evaluation": {"callbacks": [Terminate("", "evaluation")]},
        }[phase]
        trainer_of(tmp_path, **options, **changed).train()

    assert run_in_child(run) == 0  # it returned, as the parent would
    names = PublishedSequence.open(tmp_path).names if PublishedSequence.exists(tmp_path) else []
    assert names == (["one"] if phase.endswith("two") else [])
    trainer_of(tmp_path, **options).train(resume_from_checkpoint=True)
    assert_same_files(load_published(tmp_path), undisturbed)
