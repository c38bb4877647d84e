"""Training that is held to an anchor: what it adds to a step, what it leaves alone, and what cannot be one."""

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig, PublishedSequence

from ..support.tiny import lora, make_arguments, make_model, make_text_data
from ..support.trainers import InterruptAt, InterruptionError, assert_same_files, load_published, make_trainer

EXACT = EBLoRAConfig(direction_lr=0.05, scale_lr=0.01)
ROWS = 10  # of an anchor, more than the four of a batch


def rows(kind: str = "bert"):
    return make_text_data(kind, seed=9, size=ROWS).remove_columns(["labels"] if kind == "bert" else [])


class Gradients(TrainerCallback):
    """Keeps what the optimizer is about to step with."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        model = getattr(model, "module", model)
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def divergence(before: torch.Tensor, now: torch.Tensor, temperature: float) -> torch.Tensor:
    p, q = (before / temperature).softmax(-1), (now / temperature).log_softmax(-1)
    return temperature**2 * torch.nn.functional.kl_div(q, p, reduction="batchmean")


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("samples", [3, 10])  # in one part, and in three
def test_a_step_has_the_gradient_of_the_divergence(tmp_path, accumulation, samples):
    """Of the first task, where the model before it is the pre-trained one: twice w T² KL, whatever is accumulated."""
    gradients, trainers = [], []
    for name, weight in (("with", 0.7), ("without", 0.0)):
        config = EBLoRAConfig(
            direction_lr=0.05, scale_lr=0.01, anchor_weight=weight, anchor_temperature=3.0, anchor_samples=samples
        )
        kept = Gradients()
        trainer = make_trainer(
            tmp_path / name,
            tasks=("one",),
            model=make_model("bert", dtype=torch.float64),
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            max_steps=1,
            eblora_config=config,
            anchor=rows(),
            callbacks=[kept],
        )
        trainer.train()
        gradients.append(kept.steps[0])
        trainers.append(trainer)
    held, _ = trainers
    chosen = torch.cat([part.inputs["input_ids"] for part in held._anchor_steps[0]])
    assert len(chosen) == samples
    assert {tuple(row) for row in chosen.tolist()} <= {tuple(row.tolist()) for row in rows()["input_ids"]}
    # the start of the task once more, and the divergence from the base model there
    again = make_trainer(
        tmp_path / "again",
        tasks=("one",),
        model=make_model("bert", dtype=torch.float64),
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        eblora_config=EXACT,
    )

    class AtTheStart(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            model.train()
            base = make_model("bert", dtype=torch.float64)
            expected = 2 * 0.7 * divergence(base.eval()(chosen).logits, model(chosen).logits, 3.0)
            names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
            self.expected = dict(zip(names, torch.autograd.grad(expected, parameters), strict=True))

    start = AtTheStart()
    again.add_callback(start)
    again.train()
    assert start.expected.keys() == gradients[0].keys()
    assert max(value.abs().max() for value in start.expected.values()) > 1e-6
    for name, expected in start.expected.items():
        torch.testing.assert_close(gradients[0][name] - gradients[1][name], expected, atol=1e-10, rtol=1e-6)


def test_what_is_held_is_the_pre_trained_model_and_the_one_before_the_task(tmp_path):
    trainer = make_trainer(tmp_path, eblora_config=EXACT, anchor=rows())
    trainer.train()
    published = PublishedSequence.open(tmp_path)
    before = PeftModel.from_pretrained(make_model("bert"), tmp_path / published.tasks[0].folder).eval()
    base = make_model("bert").eval()
    for (part,) in (step[:1] for step in trainer._anchor_steps):
        inputs = part.inputs
        for answers, model in ((part.pretrained, base), (part.before_task, before)):
            with torch.no_grad():
                expected = (model(**inputs).logits / 2).softmax(-1)
            torch.testing.assert_close(answers.probabilities, expected, atol=1e-6, rtol=0)
        assert not torch.allclose(part.pretrained.probabilities, part.before_task.probabilities, atol=1e-5)


def test_of_no_weight_it_changes_nothing(tmp_path):
    """Neither snapshots, nor what is observed, nor evaluation, nor what is drawn: the files are the same."""
    config = EBLoRAConfig(direction_lr=0.05, scale_lr=0.01, anchor_weight=1e-30)
    sets = {name: make_text_data("bert", seed=3) for name in ("one", "two")}
    for name, own in (("with", {"eblora_config": config, "anchor": rows()}), ("without", {"eblora_config": EXACT})):
        make_trainer(tmp_path / name, eval_dataset=sets, eval_strategy="steps", eval_steps=2, **own).train()
    first, second = (load_published(tmp_path / name) for name in ("with", "without"))
    assert_same_files(first, second)
    metrics = [PublishedSequence.open(tmp_path / name).tasks[-1].metrics for name in ("with", "without")]
    assert metrics[0] == metrics[1]


def test_it_is_logged_by_itself(tmp_path):
    """`loss` is the task's at every first step; `anchor_loss` is the mean over the steps since the last entry."""
    entries = []
    for name, anchor in (("with", rows()), ("without", None)):
        trainer = make_trainer(
            tmp_path / name,
            tasks=("one",),
            eblora_config=EXACT,
            anchor=anchor,
            logging_strategy="steps",
            logging_steps=1,
            eval_dataset={"one": make_text_data("bert", seed=3)},
            eval_strategy="steps",
            eval_steps=3,
        )
        trainer.train()
        entries.append([entry for entry in trainer.state.log_history if "loss" in entry])
        assert not any("anchor_loss" in entry for entry in trainer.state.log_history if "loss" not in entry)
    assert entries[0][0]["loss"] == entries[1][0]["loss"]
    assert all(entry["anchor_loss"] > 0.0 for entry in entries[0])
    assert not any("anchor_loss" in entry for entry in entries[1])
    every = make_trainer(
        tmp_path / "every",
        tasks=("one",),
        eblora_config=EXACT,
        anchor=rows(),
        logging_strategy="steps",
        logging_steps=6,
    )
    every.train()
    (entry,) = (entry for entry in every.state.log_history if "loss" in entry)
    assert entry["anchor_loss"] == pytest.approx(np.mean([entry["anchor_loss"] for entry in entries[0]]), rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_more_is_left_of_what_the_model_said(tmp_path, kind):
    """On rows of the anchor, by the divergence from the base model's answers after two tasks."""
    left = []
    for anchor in (rows(kind), None):
        folder = tmp_path / str(anchor is None)
        config = EBLoRAConfig(direction_lr=0.3, scale_lr=0.05)
        make_trainer(folder, kind, max_steps=20, eblora_config=config, anchor=anchor).train()
        base, now = make_model(kind).eval(), PeftModel.from_pretrained(make_model(kind), folder).eval()
        inputs = {key: torch.stack(list(rows(kind)[key])) for key in rows(kind).column_names}
        with torch.no_grad():
            left.append(divergence(base(**inputs).logits, now(**inputs).logits, 2.0).item())
    assert left[0] < 0.7 * left[1]


@pytest.mark.parametrize(
    ("anchor", "task", "step"),
    [
        ("rows", "two", 5),
        ("random", "two", 3),
        pytest.param("rows", "one", 3, marks=pytest.mark.slow),
        pytest.param("rows", "two", 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_resumed_goes_on_with_the_same(tmp_path, anchor, task, step):
    def make(name, **more):
        return make_trainer(
            tmp_path / name,
            model=make_model("bert", dropout=0.1),
            eblora_config=EXACT,
            anchor=rows() if anchor == "rows" else "random",
            save_strategy="steps",
            save_steps=1,
            **more,
        )

    make("whole").train()
    cut = make("cut", callbacks=[InterruptAt(task, step)])
    with pytest.raises(InterruptionError):
        cut.train()
    make("cut").train(resume_from_checkpoint=True)
    assert_same_files(load_published(tmp_path / "whole"), load_published(tmp_path / "cut"))


@pytest.mark.parametrize("heads", ["per-task", "grow"])
def test_where_heads_are_the_tasks_own_the_last_hidden_states_are_held(tmp_path, heads):
    sets = {}
    for seed, labels in enumerate((["x", "y", "z"], ["p", "q"])):
        data = make_text_data("bert", seed=seed).with_format(None)
        numbers = [row[0] % len(labels) for row in data["input_ids"]]
        data = data.remove_columns("labels").add_column("labels", numbers)
        sets[f"t{seed}"] = data.cast_column("labels", ClassLabel(names=labels)).with_format("torch")
    moved = []
    for anchor in (rows(), None):
        trainer = ContinualEBLoRATrainer(
            model=make_model("bert"),
            args=make_arguments(tmp_path / str(anchor is None), max_steps=20),
            peft_config=lora(),
            train_dataset=sets,
            eblora_config=EBLoRAConfig(heads=heads, direction_lr=0.3, scale_lr=0.05, anchor_weight=1.0),
            anchor=anchor,
        )
        trainer.train()
        inputs = {key: torch.stack(list(rows()[key])) for key in rows().column_names}
        with torch.no_grad():
            base = make_model("bert").eval().bert(**inputs).last_hidden_state
            now = trainer.model.eval().get_base_model().bert(**inputs).last_hidden_state
        moved.append((now - base).norm().item())
        if anchor is not None:
            for (part,) in (step[:1] for step in trainer._anchor_steps):
                with torch.no_grad():
                    expected = make_model("bert").eval().bert(**part.inputs).last_hidden_state
                torch.testing.assert_close(part.pretrained.values, expected.flatten(0, 1), atol=1e-6, rtol=0)
    assert moved[0] < 0.8 * moved[1]


def test_what_is_held_of_pictures_and_of_an_encoder_decoder_are_its_own_positions(tmp_path):
    """Under heads of the tasks' own: all of a convolutional feature map, and of two padded texts no padding."""
    small = {"num_channels": 1, "depths": [1, 1], "hidden_sizes": [8, 16], "patch_size": 2, "image_size": 16}
    torch.manual_seed(0)
    convolutional = transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(**small, num_stages=2, num_labels=2)
    )
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 20}
    config = transformers.BartConfig(vocab_size=60, **sizes, **heads, num_labels=2)
    pictures = {"pixel_values": torch.randn(8, 1, 16, 16).tolist()}
    tokens = [[5, 6, 7, 2, 1, 1, 1, 1] if row % 2 else [5, 6, 7, 8, 9, 10, 11, 2] for row in range(8)]
    texts = {"input_ids": tokens, "attention_mask": [[int(token != 1) for token in row] for row in tokens]}
    labels = {"labels": [0, 1] * 4}
    for model, inputs, targets, held in (
        (convolutional, pictures, ["pwconv1", "pwconv2"], 8 * 16),
        (transformers.BartForSequenceClassification(config), texts, ["q_proj", "v_proj"], 4 * 8 + 4 * 4),
    ):
        rows = Dataset.from_dict(inputs | labels).cast_column("labels", ClassLabel(names=["x", "y"]))
        trainer = ContinualEBLoRATrainer(
            model=model,
            args=make_arguments(tmp_path / type(model).__name__, max_steps=2, per_device_train_batch_size=8),
            peft_config=LoraConfig(r=2, target_modules=targets),
            train_dataset={"one": rows.with_format("torch")},
            eblora_config=EBLoRAConfig(heads="per-task"),
            anchor=Dataset.from_dict(inputs | labels).with_format("torch"),
        )
        trainer.train()
        (part,) = trainer._anchor_steps[0]
        assert len(part.pretrained.values) == held


def test_under_autocast_and_with_activation_checkpointing(tmp_path):
    trainer = make_trainer(
        tmp_path,
        "llama",
        eblora_config=EXACT,
        anchor=rows("llama"),
        bf16=True,
        gradient_checkpointing=True,
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    values = [entry["anchor_loss"] for entry in trainer.state.log_history if "anchor_loss" in entry]
    assert len(values) == 12
    assert np.isfinite(values).all()


def test_any_method_can_be_held(tmp_path):
    for method in ("lora", "olora", "keeplora"):
        trainer = make_trainer(tmp_path / method, eblora_config=EBLoRAConfig(method=method), anchor=rows())
        trainer.train()
        assert PublishedSequence.open(tmp_path / method).training()[-1]["anchor"]["rows"] == ROWS


# ---- what is kept of it ----


def test_a_later_run_is_told_what_it_lacks(tmp_path, caplog):
    def learn(name, anchor, **options):
        caplog.clear()
        make_trainer(
            tmp_path, train_dataset=make_text_data("bert", seed=4), task_name=name, anchor=anchor, **options
        ).train()
        return [record.message for record in caplog.records if "learnt with an anchor" in record.message]

    assert learn("one", rows()) == []
    record = PublishedSequence.open(tmp_path).training()[0]["anchor"]
    assert record["kind"] == "rows"
    assert record["rows"] == ROWS
    continued = {"sequence": tmp_path}
    assert learn("two", make_text_data("bert", seed=9, size=ROWS), **continued) == []  # labels are no part of it
    (told,) = learn("three", None, **continued)
    assert (
        f"'two' was learnt with an anchor ({ROWS} rows, sha256 {record['sha256'][:12]}…), and this run has none"
        in told
    )
    assert learn("four", rows(), **continued) == []
    (told,) = learn("five", make_text_data("bert", seed=8, size=ROWS), **continued)
    assert "this run has another" in told
    assert "anchor=10 rows" in (tmp_path / "README.md").read_text("utf-8")


def test_the_hash_is_of_the_rows_and_not_of_how_they_are_used(tmp_path):
    shas = set()
    for samples, seed in ((8, 42), (3, 1)):
        folder = tmp_path / str(samples)
        config = EBLoRAConfig(anchor_samples=samples)
        make_trainer(folder, tasks=("one",), seed=seed, eblora_config=config, anchor=rows()).train()
        shas.add(PublishedSequence.open(folder).training()[0]["anchor"]["sha256"])
    assert len(shas) == 1


def test_all_rows_are_used_and_of_many_some(tmp_path, monkeypatch):
    trainer = make_trainer(
        tmp_path / "few", tasks=("one",), anchor=rows(), eblora_config=EBLoRAConfig(anchor_samples=4)
    )
    trainer.train()
    assert [sum(len(part.inputs["input_ids"]) for part in step) for step in trainer._anchor_steps] == [4, 4, 4]
    used = {tuple(row) for step in trainer._anchor_steps for part in step for row in part.inputs["input_ids"].tolist()}
    assert len(used) == ROWS
    monkeypatch.setattr("eblora_hf.trainers.anchoring._MOST_ROWS", 5)
    trainer = make_trainer(tmp_path / "many", tasks=("one",), anchor=rows())
    trainer.train()
    (step,) = trainer._anchor_steps
    assert [len(part.inputs["input_ids"]) for part in step] == [3, 2]  # batches have four


# ---- what cannot be one ----


@pytest.mark.parametrize(
    ("anchor", "says"),
    [
        ("randm", "got 'randm'"),
        ({"one": 1}, "must be a data set with a length"),
        ([], "`anchor` is empty"),
        (iter([1]), "must be a data set with a length"),
    ],
)
def test_no_anchor(tmp_path, anchor, says):
    with pytest.raises(ValueError, match=says):
        make_trainer(tmp_path / "out", anchor=anchor)
    assert not (tmp_path / "out" / "eblora_sequence.json").exists()


def test_models_without_classes_that_exclude_each_other_are_refused(tmp_path):
    model = make_model("bert")
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match=r"num_labels=3 and problem_type='multi_label_classification'"):
        make_trainer(tmp_path, model=model, anchor=rows())


def test_rows_that_the_collator_does_not_take(tmp_path):
    data = make_text_data("bert", seed=9).rename_column("input_ids", "text")
    with pytest.raises(ValueError, match="specify exactly one of input_ids or inputs_embeds") as raised:
        make_trainer(tmp_path, anchor=data).train()
    assert any("answered to rows of the `anchor`" in note for note in raised.value.__notes__)


@pytest.mark.parametrize(
    ("option", "value"),
    [("anchor_weight", -1), ("anchor_weight", float("nan")), ("anchor_temperature", 0), ("anchor_samples", 0)],
)
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=rf"{option}={value}"):
        EBLoRAConfig(**{option: value})
