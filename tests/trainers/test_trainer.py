"""The trainer on real models: sequences, evaluation, resets, resume, errors."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig, PublishedSequence, Task, TaskSequence
from eblora_hf.adapters.composition import with_heads
from eblora_hf.adapters.layers import find_layers
from eblora_hf.adapters.states import heads_of
from eblora_hf.memory.basis import join_basis
from eblora_hf.memory.gradients import mean_gradients
from eblora_hf.memory.moments import feature_moments, token_gradient_moments

from ..support.tiny import accuracy, lora, make_model, make_text_data
from ..support.trainers import (
    CONFIG,
    InterruptAt,
    InterruptionError,
    assert_same_files,
    get_stock_deltas,
    load_published,
    make_trainer,
)

# ---- learning a sequence ----

HEAD_AS_LAYER = lora(target_modules=["query", "classifier"])


@pytest.mark.parametrize("basis_dtype", ["bfloat16", "float32"])
def test_updates_are_balanced_and_avoid_the_bases(tmp_path, basis_dtype):
    """Bases in bf16 are those that their columns give when they are made orthonormal again."""
    config = EBLoRAConfig(energy_threshold=0.9, basis_dtype=basis_dtype)
    trainer = make_trainer(tmp_path, tasks=("one", "two", "three"), eblora_config=config)
    trainer.train()
    published = PublishedSequence.open(tmp_path)
    bases: dict[str, torch.Tensor] = {}
    for task in published.tasks:
        adapter = load_file(tmp_path / task.folder / "adapter_model.safetensors")
        subspace = load_file(tmp_path / task.folder / "subspace.safetensors")
        for key in [key for key in subspace if key.endswith(".columns")]:
            name = key.removesuffix(".columns")
            a = adapter[f"base_model.model.{name}.lora_A.weight"].double()
            b = adapter[f"base_model.model.{name}.lora_B.weight"].double()
            sigma = torch.linalg.svdvals(b @ a)[:4]
            assert sigma[3] / sigma[0] > 0.99999
            if name in bases:
                assert (a @ bases[name].double()).abs().max() < 2e-7
            assert subspace[key].dtype == getattr(torch, basis_dtype)
            if basis_dtype == "float32":
                bases[name] = torch.cat([*([bases[name]] if name in bases else []), subspace[key]], dim=1)
            else:
                bases[name] = join_basis(bases.get(name), subspace[key])
            assert subspace[f"{name}.captured"] >= 0.9
    for name, basis in bases.items():
        assert torch.equal(trainer.bases[name], basis)
        assert (basis.double().T @ basis.double() - torch.eye(basis.shape[1])).abs().max() < 2e-6
    rerun = PublishedSequence.open(tmp_path).bases()
    assert all(torch.equal(rerun[name], bases[name]) for name in bases)


@pytest.mark.parametrize(
    ("basis_from", "collect"),
    [
        ("gradients", mean_gradients),
        ("token-gradients", token_gradient_moments),
        ("features", feature_moments),
    ],
)
def test_basis_holds_the_energy_at_the_trained_weights(tmp_path, basis_from, collect):
    """Recomputes the snapshot of the last task on the composed model, and checks the energy inside the basis."""
    config = EBLoRAConfig(snapshot_fraction=1.0, energy_threshold=0.95, basis_from=basis_from)
    trainer = make_trainer(tmp_path, eblora_config=config, per_device_train_batch_size=24)
    trainer.train()
    data = make_text_data("bert", seed=1)
    layers = find_layers(trainer.model, "default")
    matrices = collect(trainer.model.eval(), layers, [(data[:24], 24)], lambda model, inputs: model(**inputs).loss)
    first = load_file(tmp_path / "tasks/00-one/subspace.safetensors")
    before = []
    for layer in layers:
        moment = matrices[layer.name].double()
        if basis_from == "gradients":
            moment = moment.T @ moment

        def share(basis, moment=moment):
            return ((basis.T @ moment @ basis).trace() / moment.trace()).item()

        assert share(trainer.bases[layer.name].double()) >= 0.95 - 1e-4
        before.append(share(first[f"{layer.name}.columns"].double()))
    assert min(before) < 0.95  # the first task's basis alone does not hold it


def test_second_task_really_trains_and_forgets_the_optimizer(tmp_path):
    """A second stock `train()` keeps moments, and a new adapter would not train: neither may happen here."""
    seen = []

    class Spy(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            layer = find_layers(model, "default")[0]
            optimizer = getattr(optimizer, "optimizer", optimizer)
            steps = {int(s["step"]) for s in optimizer.state.values()}
            seen.append((state.global_step, steps, layer.lora_A.detach().clone(), args.output_dir))

    trainer = make_trainer(tmp_path, callbacks=[Spy()])
    trainer.train()
    assert [(step, steps) for step, steps, _, _ in seen] == [(i, {i}) for _ in range(2) for i in range(1, 7)]
    for task in (seen[:6], seen[6:]):
        assert (task[0][2] - task[-1][2]).abs().max() > 1e-3
    assert seen[0][3].endswith("checkpoints/one")
    assert seen[6][3].endswith("checkpoints/two")


def test_wrappers_do_not_nest_over_tasks(tmp_path):
    depths = []

    class Depth(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            forward, depth = model.forward, 0
            while hasattr(forward, "__wrapped__"):
                forward, depth = forward.__wrapped__, depth + 1
            depths.append(depth)

    trainer = make_trainer(tmp_path, tasks=("one", "two", "three"), callbacks=[Depth()], bf16=True, max_steps=2)
    trainer.train()
    assert len(depths) == 6
    assert set(depths) == {3}  # accelerate's autocast, every time anew


def test_accuracy_matrix_and_logs(tmp_path):
    tasks = ("one", "two")
    evaluation = {name: make_text_data("bert", seed=i + 50) for i, name in enumerate(tasks)}
    evaluation["elsewhere"] = make_text_data("bert", seed=70)
    trainer = make_trainer(
        tmp_path,
        eval_dataset=evaluation,
        compute_metrics=accuracy,
        eval_strategy="steps",
        eval_steps=3,
        logging_strategy="steps",
        logging_steps=3,
    )
    output = trainer.train()
    matrix = trainer.accuracy_matrix
    assert matrix.shape == (2, 2)
    history = list(trainer.state.log_history)
    measured = trainer.evaluate()
    np.testing.assert_allclose(matrix[1], [measured["eval_one_accuracy"], measured["eval_two_accuracy"]])
    assert output.metrics["train_MFN"] == pytest.approx(matrix[1].mean())
    assert output.metrics["train_BWT"] == pytest.approx(matrix[1, 0] - matrix[0, 0])
    index = json.loads((tmp_path / "eblora_sequence.json").read_text())
    assert index["tasks"][1]["metrics"]["elsewhere"] == measured["eval_elsewhere_accuracy"]
    # while a task trains, its own set is evaluated under plain names; afterwards all are, by name
    plain = [entry for entry in history if "eval_accuracy" in entry]
    assert [(entry["task"], entry["step"]) for entry in plain] == [("one", 3), ("one", 6), ("two", 3), ("two", 6)]
    assert {entry["task"] for entry in history} == {"one", "two"}
    assert sum("eval_elsewhere_accuracy" in entry for entry in history) == 2


def test_per_task_overrides(tmp_path):
    data = make_text_data("bert")
    steps = []

    class Steps(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            steps.append((state.max_steps, args.learning_rate))

    tasks = TaskSequence(
        [
            Task("epochs", data, num_train_epochs=2),
            Task("steps", data, max_steps=3, learning_rate=1e-2, direction_lr=0.2, scale_lr=0.03),
            Task("plain", data),
        ]
    )
    trainer = make_trainer(tmp_path, train_dataset=tasks, callbacks=[Steps()], max_steps=4)
    trainer.train()
    assert steps == [(12, 5e-3), (3, 1e-2), (4, 5e-3)]
    rates = [json.loads(path.read_text())["rates"] for path in sorted(tmp_path.glob("tasks/*/training.json"))]
    assert rates == [
        {"direction_lr": 0.5, "scale_lr": pytest.approx(0.075)},  # "auto", at its ceiling in so short a task
        {"direction_lr": 0.2, "scale_lr": 0.03},
        {"direction_lr": 0.5, "scale_lr": pytest.approx(0.075)},
    ]
    assert trainer.args.max_steps == 4
    assert trainer.args.output_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"eblora_config": EBLoRAConfig(penalty_weight=0.0)}, 0.012),
        ({}, 0.018),
        ({"anchor": make_text_data("bert", seed=9)}, 0.036),
    ],
)
def test_auto_rates_follow_the_number_of_steps(tmp_path, options, expected):
    """s moves further where something holds the earlier tasks, or what the model knew before them."""
    trainer = make_trainer(tmp_path, tasks=("one",), max_steps=100, **options)
    trainer.train()
    assert trainer.constraint.direction_lr == pytest.approx(0.25)
    assert trainer.constraint.scale_lr == pytest.approx(expected)


def test_one_dataset_is_one_task_and_another_run_appends(tmp_path):
    trainer = make_trainer(tmp_path, train_dataset=make_text_data("bert"), task_name="first")
    trainer.train()
    before = load_published(trainer.args.output_dir)
    again = make_trainer(
        tmp_path, train_dataset=make_text_data("bert", seed=1), task_name="second", sequence=str(tmp_path)
    )
    again.train()
    both = load_published(again.args.output_dir)
    assert PublishedSequence.open(tmp_path).names == ["first", "second"]
    assert all(
        torch.equal(both[name][key], value) for name in before if name != "root" for key, value in before[name].items()
    )
    # the same two tasks in one run give the same files
    whole = make_trainer(
        tmp_path / "whole", train_dataset={"first": make_text_data("bert"), "second": make_text_data("bert", seed=1)}
    )
    whole.train()
    assert_same_files(load_published(whole.args.output_dir), both)


def test_a_sequence_is_continued_in_another_folder(tmp_path):
    make_trainer(tmp_path / "a", train_dataset=make_text_data("bert"), task_name="first").train()
    before = sorted(p.name for p in (tmp_path / "a").rglob("*"))
    trainer = make_trainer(
        tmp_path / "b", train_dataset=make_text_data("bert", seed=1), task_name="second", sequence=tmp_path / "a"
    )
    trainer.train()
    assert PublishedSequence.open(tmp_path / "b").names == ["first", "second"]
    assert sorted(p.name for p in (tmp_path / "a").rglob("*")) == before


def test_heads_are_trained_saved_and_restored(tmp_path):
    """With task_type="SEQ_CLS" PEFT trains the classifier beside the adapter; stock PEFT restores both."""
    trainer = make_trainer(tmp_path, peft_config=lora(task_type="SEQ_CLS"))
    head = trainer.model.get_base_model().classifier.modules_to_save["default"].weight.detach().clone()
    trainer.train()
    trainer.model.eval()
    inputs = make_text_data("bert", seed=9)[:4]
    loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path).eval()
    trained = loaded.get_base_model().classifier.modules_to_save["default"].weight
    assert (trained - head).abs().max() > 1e-4
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, trainer.model(**inputs).logits, atol=1e-5, rtol=1e-5)
    first = load_file(tmp_path / "tasks/00-one/adapter_model.safetensors")
    assert any(key.endswith("classifier.weight") for key in first)


def test_save_model_after_training_is_the_sum_of_all_tasks(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    trainer.save_model()  # into output_dir, as scripts do: the sequence stays intact
    PublishedSequence.open(tmp_path / "run")
    inputs = make_text_data("bert", seed=9)[:4]
    trainer.model.eval()
    for folder in ("final", "run"):
        loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path / folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).logits, trainer.model(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "final" / "earlier_tasks").exists()


# ---- the steps ----


def test_accumulation_equals_the_whole_batch(tmp_path):
    """
    Four micro-batches of 2 against one batch of 8. BERT's loss is scaled by accumulation upstream, Llama's is not.
    """
    results = []
    for name, batch, accumulation in (("whole", 8, 1), ("parts", 2, 4)):
        trainer = make_trainer(
            tmp_path / name,
            "llama",
            tasks=("one",),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            eblora_config=EBLoRAConfig(snapshot_fraction=1.0, direction_lr=0.1, scale_lr=0.01),
        )
        trainer.train()
        results.append(trainer.constraint.factors())
    for name, whole in results[0].items():
        parts = results[1][name]
        delta = whole.s * whole.U @ whole.V.T
        torch.testing.assert_close(parts.s * parts.U @ parts.V.T, delta, atol=1e-5, rtol=0)


def test_weight_decay_spares_the_factors(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=lora(task_type="SEQ_CLS"), weight_decay=0.1)
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert not any("lora_" in name for name in decayed)
    assert any("classifier" in name for name in decayed)


def test_dropout_does_not_disturb_the_snapshot(tmp_path):
    gradients = []
    for seed in (0, 1):
        trainer = make_trainer(tmp_path / str(seed), model=make_model("bert", dropout=0.5))
        trainer.train()  # opens the sequence
        torch.manual_seed(seed)
        gradients.append(trainer.snapshot(make_text_data("bert"), seed=3))
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])


# ---- interruptions ----


@pytest.mark.parametrize("method", ["eblora", "lora"])
@pytest.mark.parametrize(("task", "step"), [("one", 3), ("two", 5), ("two", 2)])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, method, task, step):
    """Parameters, s, bases, optimizer state and scheduler, bit for bit; also with dropout and a trained head."""
    options = {
        "eblora_config": EBLoRAConfig(method=method),
        "peft_config": lora(task_type="SEQ_CLS", lora_dropout=0.1),
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    }

    def run(name, resume=False, callbacks=()):
        trainer = make_trainer(
            tmp_path / name, model=make_model("bert", dropout=0.1), callbacks=list(callbacks), **options
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    with pytest.raises(InterruptionError):
        run("parts", callbacks=[InterruptAt(task, step)])
    parts = run("parts", resume=step > 2 or task == "two")
    assert_same_files(load_published(whole.args.output_dir), load_published(parts.args.output_dir))
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)
    last = "checkpoints/two/checkpoint-6"
    for file in ("optimizer.pt", "scheduler.pt"):
        one, two = (torch.load(tmp_path / name / last / file, weights_only=True) for name in ("whole", "parts"))
        assert_equal_states(one, two)
    if method == "eblora":
        one, two = (load_file(tmp_path / name / last / "eblora_state.safetensors") for name in ("whole", "parts"))
        assert_same_files({"state": one}, {"state": two})


def assert_equal_states(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_states(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, two in zip(a, b, strict=True):
            assert_equal_states(one, two)
    elif not isinstance(a, float) or not math.isnan(a):
        assert a == b


def test_the_same_command_again_after_everything_is_done(tmp_path):
    make_trainer(tmp_path).train()
    trainer = make_trainer(tmp_path)
    output = trainer.train(resume_from_checkpoint=True)
    assert output.global_step == 0
    loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path).eval()
    inputs = make_text_data("bert", seed=9)[:4]
    with torch.no_grad():
        torch.testing.assert_close(
            trainer.model.eval()(**inputs).logits, loaded(**inputs).logits, atol=1e-6, rtol=1e-6
        )


def test_checkpoints_are_stock_adapters_without_the_earlier_tasks(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    checkpoint = tmp_path / "checkpoints/two/checkpoint-3"
    assert (checkpoint / "eblora_state.safetensors").is_file()
    assert [p for p in checkpoint.iterdir() if p.is_dir()] == []
    state = load_file(checkpoint / "eblora_state.safetensors")
    deltas = get_stock_deltas("bert", checkpoint)
    for name, delta in deltas.items():
        expected = state[f"{name}.s"] * state[f"{name}.U"] @ state[f"{name}.V"].T
        torch.testing.assert_close(delta, expected, atol=1e-6, rtol=1e-5)


def test_the_best_checkpoint_is_what_gets_published(tmp_path):
    """`load_best_model_at_end` re-reads U and s with the adapter: the published update is exactly the best one's."""
    evaluation = {name: make_text_data("bert", seed=i + 50) for i, name in enumerate(("one", "two"))}
    trainer = make_trainer(
        tmp_path,
        eval_dataset=evaluation,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        max_steps=20,
    )
    trainer.train()
    for index, name in enumerate(("one", "two")):
        folder = tmp_path / "checkpoints" / name
        last = max(folder.iterdir(), key=lambda path: int(path.name.split("-")[1]))
        state = json.loads((last / "trainer_state.json").read_text())
        best = tmp_path / "checkpoints" / name / f"checkpoint-{state['best_global_step']}"
        factors = load_file(best / "eblora_state.safetensors")
        adapter = load_file(tmp_path / f"tasks/{index:02d}-{name}/adapter_model.safetensors")
        for key in [key for key in factors if key.endswith(".V")]:
            layer = key.removesuffix(".V")
            assert torch.equal(adapter[f"base_model.model.{layer}.lora_A.weight"], factors[key].T)
            torch.testing.assert_close(
                adapter[f"base_model.model.{layer}.lora_B.weight"], factors[f"{layer}.s"] * factors[f"{layer}.U"]
            )


def test_half_written_checkpoints_are_passed_over(tmp_path):
    """What a killed process leaves is never read: the newest complete checkpoint is used, with the same result."""
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path / "whole", **options).train()
    with pytest.raises(InterruptionError):
        make_trainer(tmp_path / "parts", **options, callbacks=[InterruptAt("one", 5)]).train()
    newest = tmp_path / "parts/checkpoints/one/checkpoint-4"
    state = (newest / "trainer_state.json").read_text()
    (newest / "trainer_state.json").write_text(state[: len(state) // 2])
    (newest / "optimizer.pt").write_bytes(b"")
    trainer = make_trainer(tmp_path / "parts", **options)
    trainer.train(resume_from_checkpoint=True)
    assert_same_files(load_published(tmp_path / "whole"), load_published(tmp_path / "parts"))


def test_a_checkpoint_without_our_state_is_an_error(tmp_path):
    with pytest.raises(InterruptionError):
        make_trainer(tmp_path, save_strategy="steps", save_steps=2, callbacks=[InterruptAt("one", 5)]).train()
    (tmp_path / "checkpoints/one/checkpoint-4/eblora_state.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-4.eblora_state.safetensors is missing"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_earlier_tasks_are_measured_with_their_own_head(tmp_path):
    evaluation = {name: make_text_data("bert", seed=i + 50) for i, name in enumerate(("one", "two"))}
    trainer = make_trainer(
        tmp_path,
        peft_config=lora(task_type="SEQ_CLS"),
        eval_dataset=evaluation,
        compute_metrics=lambda prediction: {"accuracy": float(prediction.predictions.sum())},  # shows every change
    )
    trainer.train()
    now = trainer.evaluate()
    matrix = trainer.accuracy_matrix
    assert matrix[1, 1] == pytest.approx(now["eval_two_accuracy"], rel=1e-5)
    assert matrix[1, 0] != pytest.approx(now["eval_one_accuracy"], rel=1e-3)  # measured with the first task's head
    first = heads_of(trainer.task_callback.sequence.adapters(["one"])[0])
    with with_heads(trainer.model, "default", first):
        assert matrix[1, 0] == pytest.approx(trainer.evaluate()["eval_one_accuracy"], rel=1e-5)
    assert trainer.evaluate()["eval_two_accuracy"] == now["eval_two_accuracy"]


# ---- errors ----


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ({"peft_config": None}, ValueError, r"(?s)no LoRA adapter.*peft_config=LoraConfig\(r=16"),
        ({"model": None}, ValueError, "needs a `model`"),
        (
            {"peft_config": lora(target_modules=["query", "classifier"])},
            ValueError,
            r"classifier: rank 4 exceeds the smaller side.*exclude_modules",
        ),
        ({"train_dataset": {}}, ValueError, "at least one task"),
        ({"train_dataset": {"../up": [1]}}, ValueError, r"'../up' is not a safe folder name"),
        ({"train_dataset": {"a": [], "b": [1]}}, ValueError, "training set of 'a' is empty"),
        ({"train_dataset": {"a": iter([1])}}, ValueError, "has no length"),
        ({"task_name": "x"}, ValueError, "names a single data set"),
        ({"eval_dataset": {"one": [1]}}, ValueError, r"no set for the task\(s\) two; it has one"),
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}, ValueError, "optimizer_cls_and_kwargs"),
        ({"model_init": make_model}, ValueError, "model_init"),
        ({"unknown_argument": 1}, TypeError, "unknown_argument"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, overrides, error, words):
    folder = tmp_path / "out"
    with pytest.raises(error, match=words):
        make_trainer(folder, **overrides)
    assert not folder.exists()


def test_peft_models_are_taken_as_they_are_or_refused(tmp_path):
    model = get_peft_model(make_model("bert"), lora(**CONFIG))
    with pytest.raises(ValueError, match=r"already is a PeftModel.*Remove it"):
        make_trainer(tmp_path, model=model)
    make_trainer(tmp_path / "run", model=model, peft_config=None).train()
    with pytest.raises(ValueError, match=r"is frozen"):
        make_trainer(tmp_path / "again", model=model, peft_config=None)
    trained = PeftModel.from_pretrained(make_model("bert"), tmp_path / "run", is_trainable=True)
    with pytest.raises(ValueError, match=r"already holds a trained update.*merge_and_unload"):
        make_trainer(tmp_path / "again", model=trained, peft_config=None)


def test_an_existing_sequence_is_never_overwritten(tmp_path):
    make_trainer(tmp_path).train()
    before = load_published(tmp_path)
    with pytest.raises(ValueError, match="already holds a sequence"):
        make_trainer(tmp_path).train()
    again = make_trainer(tmp_path, sequence=tmp_path, task_name="one", train_dataset=make_text_data("bert"))
    with pytest.raises(ValueError, match=r"already has the task\(s\) one"):
        again.train()
    make_trainer(tmp_path, sequence=tmp_path).train()  # a full list: what is learnt is passed over
    with pytest.raises(ValueError, match="Nothing to resume"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
    other = make_model("llama")
    with pytest.raises(ValueError, match="whose weights have other names or shapes"):
        make_trainer(tmp_path, "llama", model=other, tasks=("three",), sequence=tmp_path).train()
    assert_same_files(before, load_published(tmp_path))


def test_a_missing_basis_is_an_error_and_not_a_warning(tmp_path):
    make_trainer(tmp_path).train()
    path = tmp_path / "tasks/00-one/subspace.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"tasks/00-one/subspace.safetensors of the task 'one' was changed"):
        make_trainer(tmp_path, tasks=("three",), sequence=tmp_path).train()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"tasks/00-one/subspace.safetensors of the task 'one' is missing"):
        make_trainer(tmp_path, tasks=("three",), sequence=tmp_path).train()


def test_training_never_runs_unconstrained(tmp_path):
    class Careless(ContinualEBLoRATrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            return Trainer.create_scheduler(self, num_training_steps, optimizer)

    with pytest.raises(RuntimeError, match="would run without its constraint"):
        make_trainer(tmp_path, cls=Careless).train()


def test_streams_are_refused(tmp_path):
    stream = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [0]}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"IterableDataset.*has no length.*Materialise"):
        make_trainer(tmp_path, train_dataset=stream)
