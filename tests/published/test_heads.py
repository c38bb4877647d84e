"""Tasks with labels of their own: trained, published, and loaded by stock PEFT, with the accuracies of the matrix."""

import json
import re

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, List, Value
from peft import get_peft_model
from safetensors.torch import load_file

from eblora_hf import (
    ContinualEBLoRATrainer,
    EBLoRAConfig,
    PublishedSequence,
    Task,
    TaskSequence,
    load_sequence,
    push_sequence,
)
from eblora_hf.published.card import render_card

from ..support.children import run_script
from ..support.tiny import accuracy, lora, make_arguments, make_model
from ..support.trainers import InterruptAt, InterruptionError, assert_same_files, load_published

LABELS = {"a": ["x", "y", "z"], "b": ["p", "q", "r", "s", "t"], "c": ["u", "v"]}
OF_GROWN = {"a": 3, "b": 8, "c": 10}


def make_data(seed, labels, size=40, named=True):
    """Rows whose label is told by their first token, but for some where nothing tells it."""
    rng = np.random.default_rng(seed)
    tokens, numbers = rng.integers(3, 60, size=(size, 8)), np.arange(size) % len(labels)
    tokens[:, 0] = np.where(rng.random(size) < 0.8, 3 + 11 * seed + numbers, tokens[:, 0])
    rows = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": numbers}
    integers = List(Value("int64"))
    features = {"input_ids": integers, "attention_mask": integers, "labels": ClassLabel(names=labels)}
    features |= {} if named else {"labels": Value("int64")}
    return Dataset.from_dict(rows, features=Features(features)).with_format("torch")


SETS = {name: make_data(i, labels) for i, (name, labels) in enumerate(LABELS.items())}


def train(folder, mode, model=None, tasks=SETS, resume=None, callbacks=(), **options):
    sets = {task.name: task.train_dataset for task in tasks} if isinstance(tasks, TaskSequence) else tasks
    trainer = ContinualEBLoRATrainer(
        model=model or make_model("bert"),
        args=make_arguments(folder, max_steps=25, per_device_train_batch_size=8, save_strategy="steps", save_steps=10),
        peft_config=options.pop("peft_config", lora()),
        eblora_config=EBLoRAConfig(heads=mode),
        train_dataset=tasks,
        eval_dataset=options.pop("eval_sets", sets),
        compute_metrics=accuracy,
        callbacks=list(callbacks),
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


STOCK = """
    import sys
    sys.modules["eblora_hf"] = None
    import json, torch, transformers
    from peft import PeftModel
    base, source, wanted = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    found = {}
    for name, (options, labels, tokens, numbers) in wanted.items():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=labels, ignore_mismatched_sizes=True
        )
        model = PeftModel.from_pretrained(model, source, **options).eval()
        with torch.no_grad():
            answers = model(input_ids=torch.tensor(tokens)).logits.argmax(-1)
        found[name] = (answers == torch.tensor(numbers)).double().mean().item()
    print(json.dumps(found))
"""


def stock(folder, base, source, wanted):
    """Accuracies in a process that cannot import this package, of adapters on base models of so many labels."""
    script = run_script(STOCK, folder, str(base), source, json.dumps(wanted), HF_HUB_CACHE=str(folder / "cache"))
    assert script.returncode == 0, script.stderr[-3000:]
    return json.loads(script.stdout.splitlines()[-1])


def rows_of(name, options, labels, first=0):
    data = SETS[name].with_format("numpy")[:]
    return options, labels, data["input_ids"].tolist(), (data["labels"] + first).tolist()


@pytest.mark.parametrize("mode", ["per-task", "grow"])
def test_stock_peft_reaches_the_accuracies_of_the_matrix(server, tmp_path, mode):
    make_model("bert").save_pretrained(tmp_path / "base")  # with three labels
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    trainer = train(tmp_path / "out", mode, base)
    push_sequence(tmp_path / "out", "me/seq")
    matrix, root = trainer.accuracy_matrix, trainer.root_accuracy_matrix
    if mode == "grow":  # as it is after each task, told nothing: all rows of the matrix
        wanted = {
            f"{after} {name}": rows_of(name, {"revision": f"task-{t:02d}-{after}"}, OF_GROWN[after], start)
            for t, after in enumerate(LABELS)
            for name, start in list(zip(LABELS, (0, 3, 8), strict=True))[: t + 1]
        }
        expected = {f"{after} {name}": matrix[t, i] for t, after in enumerate(LABELS) for i, name in enumerate(LABELS)}
        assert np.array_equal(matrix, root, equal_nan=True)
    else:  # a task's own number is in its row: its head, and the tasks so far
        wanted = {
            name: rows_of(name, {"revision": f"task-{t:02d}-{name}"}, len(labels))
            for t, (name, labels) in enumerate(LABELS.items())
        }
        expected = {name: matrix[t, t] for t, name in enumerate(LABELS)}
        assert np.array_equal(np.diagonal(root), np.diagonal(matrix))
        assert np.isnan(root[np.tril_indices(3, -1)]).all()  # the root has no head for an earlier task
    found = stock(tmp_path, tmp_path / "base", "me/seq", wanted)
    assert found == {name: expected[name] for name in wanted}
    assert max(found.values()) > 0.7  # they have learnt something


def test_every_head_is_at_hand_whatever_the_base_came_with(tmp_path):
    trainer = train(tmp_path, "per-task")
    for i, (name, labels) in enumerate(LABELS.items()):
        model = load_sequence(make_model("bert"), tmp_path, head=name)
        config = model.get_base_model().config
        assert (config.num_labels, list(config.id2label.values())) == (len(labels), labels)
        data = SETS[name].with_format("torch")[:]
        with torch.no_grad():
            output = model(**data)
        found = float((output.logits.argmax(-1) == data["labels"]).double().mean())
        assert found == trainer.accuracy_matrix[-1, i]
        assert torch.isfinite(output.loss)
    assert PublishedSequence.open(tmp_path).labels_of_head("b") == LABELS["b"]


def test_rows_of_earlier_labels_stay_what_they_are_whatever_the_optimizer_does(tmp_path):
    trainer = train(tmp_path, "grow", peft_config=lora(r=2))
    adapters = PublishedSequence.open(tmp_path).adapters()
    for kind in ("weight", "bias"):
        first, second, third = (adapter[f"base_model.model.classifier.{kind}"] for adapter in adapters)
        assert torch.equal(first, second[:3])
        assert torch.equal(second, third[:8])
        assert third[8:].abs().max() > 0
    config = trainer.model.get_base_model().config
    assert list(config.id2label.values()) == [label for labels in LABELS.values() for label in labels]
    assert trainer.predict(SETS["c"]).metrics["test_accuracy"] == trainer.accuracy_matrix[-1, 2]


def test_a_label_that_was_learnt_before_keeps_its_row(tmp_path):
    tasks = {"a": SETS["a"], "d": make_data(3, ["z", "new"])}
    train(tmp_path, "grow", tasks=tasks)
    assert PublishedSequence.open(tmp_path).labels_of_head("d") == ["x", "y", "z", "new"]


def test_a_shared_label_is_learnt_on_under_a_growing_head(tmp_path):
    """As "O" is in every task of token classification: its row is not masked while the second task is learnt."""
    tasks = {"a": make_data(0, ["cat", "dog"]), "b": make_data(1, ["dog", "bird"])}
    trainer = train(tmp_path, "grow", tasks=tasks)
    assert all(entry["loss"] < 10 for entry in trainer.state.log_history if "loss" in entry)
    assert all(entry["train_loss"] < 10 for entry in trainer.state.log_history if "train_loss" in entry)
    assert trainer.evaluate({"b": tasks["b"]})["eval_b_loss"] < 10
    again = train(tmp_path / "again", "grow", tasks={"a": tasks["a"], "c": make_data(2, ["dog", "cat"])})
    assert again.begun.sequence.labels_of_head("c") == ["cat", "dog"]


def test_a_single_set_gets_the_head_that_has_its_labels(tmp_path, caplog):
    for mode in ("per-task", "grow"):
        trainer = train(tmp_path / mode, mode)
        alone = trainer.evaluate(SETS["a"])["eval_accuracy"]
        assert alone == trainer.evaluate({"a": SETS["a"]})["eval_a_accuracy"] == trainer.accuracy_matrix[-1, 0]
    unknown = make_data(0, LABELS["a"], named=False)
    trainer.predict(unknown)
    assert "does not say its labels" in caplog.text
    assert trainer.evaluate({"held-out": SETS["a"]})["eval_held-out_accuracy"] == trainer.accuracy_matrix[-1, 0]


def test_a_number_that_no_label_has_is_named(tmp_path):
    trainer = train(tmp_path, "grow", tasks={"a": SETS["a"]})
    strange = make_data(0, LABELS["b"], named=False)
    with pytest.raises(ValueError, match="A row has the label 4, but the data have the labels 0 to 2: x, y, z"):
        trainer.evaluate({"a": strange})


def test_an_evaluation_set_in_another_order(tmp_path):
    turned = SETS["a"].with_format(None).map(lambda row: {"labels": 2 - row["labels"]})
    turned = turned.cast_column("labels", ClassLabel(names=LABELS["a"][::-1])).with_format("torch")
    task = TaskSequence([Task("a", SETS["a"], turned)])
    trainer = train(tmp_path / "out", "grow", tasks=task, eval_sets={})
    assert trainer.accuracy_matrix[0, 0] == trainer.evaluate({"a": SETS["a"]})["eval_a_accuracy"] > 0.5
    with pytest.raises(ValueError, match="Bring them into one order"):
        train(tmp_path / "other", "per-task", tasks=task, eval_sets={})


@pytest.mark.parametrize("mode", ["per-task", "grow"])
def test_a_peft_model_serves_again_as_well(tmp_path, mode):
    model = get_peft_model(make_model("bert"), lora(modules_to_save=["classifier"]))
    with pytest.raises(InterruptionError):
        train(tmp_path, mode, model, callbacks=[InterruptAt("b", 15)], peft_config=None)
    train(tmp_path, mode, model, resume=True, peft_config=None)
    assert PublishedSequence.open(tmp_path).names == list(LABELS)


def test_an_optimizer_that_does_not_know_the_head_is_refused(tmp_path):
    model = get_peft_model(make_model("bert"), lora(modules_to_save=["classifier"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"does not hold .*classifier.*optimizer_cls_and_kwargs"):
        train(tmp_path, "grow", model, tasks={"b": SETS["b"]}, peft_config=None, optimizers=(optimizer, None))


def test_a_refused_construction_leaves_the_model_as_it_was(tmp_path):
    model = make_model("bert")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}, set(vars(model))
    with pytest.raises(ValueError, match="does not say its own"):
        train(tmp_path, "grow", model, tasks={"a": make_data(0, LABELS["a"], named=False)})
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}, set(vars(model))
    assert before == after


def test_a_left_over_column_is_not_looked_at(tmp_path):
    data = SETS["a"].with_format(None).add_column("label", list(range(40))).with_format("torch")
    train(tmp_path, "shared", tasks={"a": data})


@pytest.mark.parametrize("mode", ["per-task", "grow"])
def test_interrupted_and_continued_elsewhere_is_the_same(tmp_path, mode):
    train(tmp_path / "whole", mode)
    with pytest.raises(InterruptionError):
        train(tmp_path / "parts", mode, callbacks=[InterruptAt("b", 15)])
    train(tmp_path / "parts", mode, resume=True)
    assert_same_files(load_published(tmp_path / "whole"), load_published(tmp_path / "parts"))
    first = {"a": SETS["a"], "b": SETS["b"]}
    train(tmp_path / "first", mode, tasks=first)
    train(tmp_path / "second", mode, sequence=tmp_path / "first")  # the full list: what is learnt is passed over
    assert_same_files(load_published(tmp_path / "whole"), load_published(tmp_path / "second"))


def test_a_model_serves_again_after_a_run(tmp_path):
    model = make_model("bert")
    train(tmp_path / "one", "per-task", model)
    assert model.config.num_labels == 2
    train(tmp_path / "two", "per-task", model)  # a notebook cell run twice
    assert_same_files(load_published(tmp_path / "one"), load_published(tmp_path / "two"))


def test_heads_of_several_layers(tmp_path):
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, num_labels=3
    )
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path / "base")
    base = transformers.RobertaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=7)
    train(tmp_path / "out", "grow", base)
    adapters = PublishedSequence.open(tmp_path / "out").adapters()
    assert [len(adapter["base_model.model.classifier.out_proj.weight"]) for adapter in adapters] == [3, 8, 10]
    dense = [adapter["base_model.model.classifier.dense.weight"] for adapter in adapters]
    assert torch.equal(dense[0], dense[2])  # what earlier rows stand on


def test_the_index_and_the_card_say_which_labels(tmp_path):
    trainer = train(tmp_path, "per-task")
    index = json.loads((tmp_path / "eblora_sequence.json").read_text())
    assert index["heads"] == "per-task"
    assert {task["name"]: task["labels"] for task in index["tasks"]} == LABELS
    card = render_card(trainer.task_callback.sequence, "me/seq")
    assert "num_labels=2" in card
    assert "p, q, r, s, t" in card


def test_a_shared_head_is_measured_as_it_was_learnt_and_as_it_is_published(tmp_path):
    first = make_data(0, ["0", "1", "2"])
    tasks = {"a": first, "b": first.map(lambda row: {"labels": (row["labels"] + 1) % 3})}  # they contradict each other
    trainer = train(tmp_path, "shared", tasks=tasks, peft_config=lora(task_type="SEQ_CLS"))
    own, root = trainer.accuracy_matrix, trainer.root_accuracy_matrix
    assert own[1, 0] != root[1, 0]
    for name, matrix in (("a", own), (None, root)):
        model = load_sequence(make_model("bert"), tmp_path, head=name)
        data = tasks["a"][:]
        with torch.no_grad():
            right = model(**data).logits.argmax(-1) == data["labels"]
        assert float(right.double().mean()) == matrix[1, 0]
    assert PublishedSequence.open(tmp_path).tasks[1].root_metrics == {"a": root[1, 0], "b": root[1, 1]}
    card = (tmp_path / "README.md").read_text()
    assert "which is what plain PEFT loads" in card
    assert f"| b | {root[1, 0]:.4g} | {root[1, 1]:.4g} |" in card
    assert f"| b | {own[1, 0]:.4g} | {own[1, 1]:.4g} |" in card


UNNAMED = make_data(0, LABELS["a"], named=False)
UNLABELLED = UNNAMED.with_format(None).map(lambda row: {"labels": row["labels"] - 1}).with_format("torch")
SEVERAL = UNNAMED.with_format(None).remove_columns("labels").add_column("labels", [[1.0, 0.0, 1.0]] * 40)


@pytest.mark.parametrize(
    ("mode", "tasks", "words"),
    [
        ("per-task", {"a": UNNAMED}, "'a' does not say its own. Pass Task(…, labels="),
        ("grow", {"a": make_data(0, ["x"])}, "'a' has the one label 'x'"),
        ("shared", {"a": UNLABELLED}, "'a' has rows with the label -1"),
        ("grow", TaskSequence([Task("a", SEVERAL, labels=LABELS["a"])]), "'a' has labels that are no whole numbers"),
        ("shared", {"a": SETS["a"], "b": SETS["b"]}, "'b' has the 5 labels p, q, r, s, t, but the model's head has 3"),
        ("grow", TaskSequence([Task("a", UNNAMED, labels=["x", "y"])]), "'a' has rows with the label 2"),
        ("shared", {"a": UNNAMED, "b": make_data(0, LABELS["b"], named=False)}, "'b' has rows with the label 4"),
    ],
    ids=[
        "no-names",
        "one-label",
        "unlabelled",
        "several",
        "other-number",
        "out-of-range",
        "out-of-range-shared",
    ],
)
def test_labels_that_do_not_fit_are_named_before_anything_is_trained(tmp_path, mode, tasks, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        train(tmp_path / "out", mode, tasks=tasks)
    assert not (tmp_path / "out").exists()


def test_what_heads_of_ones_own_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1 is not supported with heads='grow'"):
        ContinualEBLoRATrainer(
            model=make_model("bert"),
            args=make_arguments(tmp_path, label_smoothing_factor=0.1),
            peft_config=lora(),
            eblora_config=EBLoRAConfig(heads="grow"),
            train_dataset=SETS,
        )
    with pytest.raises(ValueError, match="no linear layer with an output for each of the model's labels"):
        train(tmp_path, "grow", make_model("llama"))
    train(tmp_path / "out", "grow", tasks={"a": SETS["a"]})
    with pytest.raises(ValueError, match="has heads='grow', and this run heads='per-task'"):
        train(tmp_path / "out", "per-task", tasks={"b": SETS["b"]}, sequence=tmp_path / "out")


@pytest.mark.parametrize("labels", ["abc", [], ["a", "a"], [""], [1, 2]])
def test_labels_are_different_names(labels):
    with pytest.raises(ValueError, match="expected a list of different names"):
        Task("a", UNNAMED, labels=labels)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "trained"])
def test_a_head_that_nobody_named_is_trained_and_published(tmp_path, fresh):
    kind = transformers.BertForMaskedLM if fresh else transformers.BertForSequenceClassification
    kind(make_model("bert").config).save_pretrained(tmp_path / "base")
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    without = lora(exclude_modules=["classifier"])
    train(tmp_path / "out", "shared", base, tasks={"a": SETS["a"]}, peft_config=without)
    assert ("base_model.model.classifier.weight" in load_file(tmp_path / "out/adapter_model.safetensors")) == fresh
    assert without.modules_to_save is None  # the user's own


def test_all_linear_takes_a_small_head_for_a_head(tmp_path):
    """The first lines of the README, for an encoder: three labels are fewer than the rank."""
    train(tmp_path, "shared", tasks={"a": SETS["a"]}, peft_config=lora(r=16))
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")


def test_a_random_head_on_a_peft_model_is_refused_with_the_words_to_use(tmp_path):
    transformers.BertForMaskedLM(make_model("bert").config).save_pretrained(tmp_path / "base")
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = get_peft_model(base, lora(exclude_modules=["classifier"]))
    with pytest.raises(ValueError, match=r"Pass LoraConfig\(modules_to_save=\['classifier'\]\) to `get_peft_model`"):
        ContinualEBLoRATrainer(model=model, args=make_arguments(tmp_path), train_dataset={"a": SETS["a"]})
