"""Set-ups that users bring along, each of which has gone wrong once somewhere."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from eblora_hf import ContinualEBLoRATrainer, ContinualMixin, EBLoRAConfig, PublishedSequence, Task, TaskSequence

from ..support.tiny import accuracy, lora, make_arguments, make_model, make_text_data
from ..support.trainers import CONFIG, InterruptAt, InterruptionError, assert_same_files, load_published, make_trainer

SAVING = {"save_strategy": "steps", "save_steps": 2}


def named_model(adapter: str, extra: bool) -> PeftModel:
    model = get_peft_model(make_model("bert"), lora(**CONFIG), adapter_name=adapter)
    if extra:
        model.add_adapter("unused", lora(**CONFIG))
    return model


@pytest.mark.parametrize(("adapter", "extra"), [("mine", False), ("default", True), ("mine", True)])
def test_resume_with_named_and_with_inactive_adapters(tmp_path, adapter, extra):
    def run(folder, resume=False, callbacks=()):
        model = named_model(adapter, extra)
        trainer = make_trainer(folder, model=model, peft_config=None, callbacks=list(callbacks), **SAVING)
        trainer.train(resume_from_checkpoint=resume)

    run(tmp_path / "whole")
    with pytest.raises(InterruptionError):
        run(tmp_path / "parts", callbacks=[InterruptAt("two", 5)])
    run(tmp_path / "parts", resume=True)
    assert_same_files(load_published(tmp_path / "whole"), load_published(tmp_path / "parts"))


def test_the_best_checkpoint_of_a_named_adapter_is_loaded(tmp_path):
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }
    for adapter in ("default", "mine"):
        make_trainer(
            tmp_path / adapter,
            model=named_model(adapter, False),
            peft_config=None,
            train_dataset=make_text_data("bert"),
            eval_dataset=make_text_data("bert", seed=50),
            eblora_config=EBLoRAConfig(method="lora"),
            **options,
            **SAVING,
        ).train()
    assert_same_files(load_published(tmp_path / "default"), load_published(tmp_path / "mine"))


@pytest.mark.parametrize("resume", [False, True])
def test_the_same_trainer_after_an_interruption(tmp_path, resume):
    """Ctrl-C in a notebook, then `train()` again on the same object."""
    make_trainer(tmp_path / "whole", **SAVING).train()
    interrupt = InterruptAt("one", 5)
    trainer = make_trainer(tmp_path / "parts", **(SAVING if resume else {}), callbacks=[interrupt])
    with pytest.raises(InterruptionError):
        trainer.train()
    trainer.remove_callback(interrupt)
    trainer.train(resume_from_checkpoint=resume)
    assert_same_files(load_published(tmp_path / "whole"), load_published(tmp_path / "parts"))


def test_checkpoints_of_an_aborted_run_are_not_mixed_with_a_new_one(tmp_path):
    with pytest.raises(InterruptionError):
        make_trainer(tmp_path, **SAVING, callbacks=[InterruptAt("one", 5)]).train()
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        make_trainer(tmp_path, **SAVING).train()


def test_a_checkpoint_path_must_be_of_the_task(tmp_path):
    make_trainer(tmp_path, tasks=("one",), **SAVING).train()
    other = tmp_path / "checkpoints/one/checkpoint-4"
    trainer = make_trainer(tmp_path, tasks=("two",), sequence=tmp_path, **SAVING)
    with pytest.raises(ValueError, match=r"checkpoint-4 is not a checkpoint of the task 'two'"):
        trainer.train(resume_from_checkpoint=str(other))
    assert PublishedSequence.open(tmp_path).names == ["one"]


def test_a_checkpoint_without_optimizer_is_an_error(tmp_path):
    with pytest.raises(InterruptionError):
        make_trainer(tmp_path, **SAVING, callbacks=[InterruptAt("one", 5)]).train()
    (tmp_path / "checkpoints/one/checkpoint-4/optimizer.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"optimizer.pt is missing .*fresh optimizer"):
        make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)


def test_a_users_optimizer_is_used_once_and_never_replaced(tmp_path):
    used = []

    class Spy(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            used.append(type(getattr(optimizer, "optimizer", optimizer)))

    make_trainer(tmp_path, tasks=("one",)).train()
    model = get_peft_model(make_model("bert"), lora(**CONFIG))
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    options = {"model": model, "peft_config": None, "tasks": ("two",), "sequence": tmp_path, "callbacks": [Spy()]}
    trainer = make_trainer(tmp_path, optimizers=(sgd, None), **options)
    trainer.train()
    assert set(used) == {torch.optim.SGD}
    with pytest.raises(ValueError, match="sets a learning rate, but `optimizers` brings its own"):
        make_trainer(
            tmp_path / "x",
            optimizers=(sgd, None),
            train_dataset=TaskSequence([Task("a", make_text_data("bert"), learning_rate=1.0)]),
        )


def test_a_tasks_learning_rate_reaches_an_optimizer_class(tmp_path):
    tasks = TaskSequence([Task("a", make_text_data("bert"), learning_rate=1e-2), Task("b", make_text_data("bert"))])
    trainer = make_trainer(tmp_path, train_dataset=tasks, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-4}))
    trainer.train()
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("tasks/*/training.json"))]
    assert [record["learning_rate"] for record in records] == [1e-2, 1e-4]


def test_persistent_workers_do_not_carry_a_set_into_the_next_task(tmp_path):
    data = {name: make_text_data("bert", seed=i) for i, name in enumerate(("one", "two"))}
    results = []
    for workers in (0, 1):
        trainer = make_trainer(
            tmp_path / str(workers),
            train_dataset=data,
            eval_dataset={name: make_text_data("bert", seed=i + 60) for i, name in enumerate(data)},
            compute_metrics=lambda prediction: {"accuracy": float(prediction.predictions.sum())},
            eval_strategy="epoch",
            dataloader_num_workers=workers,
            dataloader_persistent_workers=bool(workers),
        )
        trainer.train()
        results.append([entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry])
    assert results[0] == pytest.approx(results[1])


def test_another_base_model_of_the_same_shape_is_refused(tmp_path):
    make_trainer(tmp_path, tasks=("one",)).train()
    with pytest.raises(ValueError, match="whose weights have other values"):
        make_trainer(tmp_path, tasks=("two",), sequence=tmp_path, model=make_model("bert", seed=5)).train()


def test_a_refused_construction_leaves_the_users_model_alone(tmp_path):
    model = make_model("bert")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="exclude_modules"):
        make_trainer(tmp_path, model=model, peft_config=lora(target_modules=["query", "classifier"]))
    assert [name for name, _ in model.named_parameters()] == names
    make_trainer(tmp_path, model=model, peft_config=lora(**CONFIG)).train()  # what the message says works


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_users_loss_function(tmp_path, kind):
    def loss(outputs, labels, num_items_in_batch=None):
        logits, labels = (outputs.logits, labels) if kind == "bert" else (outputs.logits[:, :-1], labels[:, 1:])
        total = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
        return total / num_items_in_batch

    make_trainer(tmp_path, kind, compute_loss_func=loss, tasks=("one",)).train()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query", "LayerNorm"], "exclude_modules": ".*LayerNorm.*"},
        {"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": "layer"},
        {"target_modules": r".*layer\.1.*(query|key)"},
        {"target_modules": ["query", "value"], "rank_pattern": {"query": 2}, "use_rslora": True, "lora_dropout": 0.2},
    ],
)
def test_whatever_chose_the_layers_is_kept_to_the_end(tmp_path, options):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(**({"r": 4, "lora_alpha": 8} | options)))
    before = [layer.name for layer in trainer.layers]
    trainer.train()
    assert [layer.name for layer in trainer.layers] == before
    adapted = [n for n, m in trainer.model.get_base_model().named_modules() if hasattr(m, "lora_A")]
    assert adapted == before
    inputs = make_text_data("bert", seed=9)[:4]
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path).eval()(**inputs).logits
        torch.testing.assert_close(loaded, trainer.model.eval()(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_a_task_that_fails_at_its_end_is_not_lost(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out")
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    real = trainer.method.end_task

    def fail(*args):
        raise ValueError("on purpose")

    monkeypatch.setattr(trainer.method, "end_task", fail)
    with pytest.raises(ValueError, match="on purpose"):
        trainer.train()
    monkeypatch.setattr(trainer.method, "end_task", real)
    again = make_trainer(tmp_path / "out")
    again.train(resume_from_checkpoint=True)
    assert_same_files(load_published(tmp_path / "whole"), load_published(tmp_path / "out"))


def test_trainers_of_users_and_seq2seq(tmp_path):
    class Mine(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    class Continual(ContinualMixin, Mine):
        pass

    trainer = Continual(
        make_model("bert"), make_arguments(tmp_path / "a"), None, make_text_data("bert"), peft_config=lora(**CONFIG)
    )
    trainer.train()
    assert PublishedSequence.open(tmp_path / "a").names == ["task"]

    class ContinualSeq2Seq(ContinualMixin, Seq2SeqTrainer):
        pass

    args = Seq2SeqTrainingArguments(**make_arguments(tmp_path / "b").to_dict() | {"predict_with_generate": True})
    data = make_text_data("t5")
    trainer = ContinualSeq2Seq(
        model=make_model("t5"),
        args=args,
        peft_config=lora(target_modules=["q", "v", "wi"]),
        train_dataset={"one": data, "two": make_text_data("t5", seed=1)},
        eval_dataset={"one": data, "two": data},
        compute_metrics=lambda prediction: {
            "accuracy": float((prediction.predictions[:, 1] == prediction.label_ids[:, 0]).mean())
        },
    )
    trainer.train()
    assert trainer.accuracy_matrix.shape == (2, 2)
    with pytest.raises(TypeError, match="twice: model"):
        Continual(make_model("bert"), model=make_model("bert"))


def test_a_plain_evaluation_set_fills_the_matrix_when_appending(tmp_path):
    for name in ("one", "two"):
        trainer = make_trainer(
            tmp_path,
            train_dataset=make_text_data("bert"),
            task_name=name,
            eval_dataset=make_text_data("bert", seed=50),
            compute_metrics=accuracy,
            sequence=None if name == "one" else tmp_path,
        )
        trainer.train()
    matrix = trainer.accuracy_matrix
    assert 0.0 <= matrix[0, 0] <= 1.0
    assert matrix[1, 1] == trainer.evaluate()["eval_accuracy"]


def test_metrics_by_another_name(tmp_path):
    evaluation = {name: make_text_data("bert", seed=50) for name in ("one", "two")}
    options = {"eval_dataset": evaluation, "compute_metrics": lambda prediction: {"F1 (macro) | %": 0.25}}
    trainer = make_trainer(tmp_path / "named", metric_for_best_model="F1 (macro) | %", **options)
    trainer.train()
    assert trainer.accuracy_matrix.tolist() == [[0.25, 0.25], [0.25, 0.25]]
    trainer = make_trainer(tmp_path / "unnamed", **options)
    trainer.train()
    assert trainer.accuracy_matrix.tolist() == [[0.25, 0.25], [0.25, 0.25]]  # the only one there is
    assert "`F1_macro_` on each task (column)" in (tmp_path / "unnamed/README.md").read_text()


def test_without_metrics_the_matrix_is_of_the_loss(tmp_path):
    evaluation = {name: make_text_data("bert", seed=i + 50) for i, name in enumerate(("one", "two"))}
    trainer = make_trainer(tmp_path, eval_dataset=evaluation)
    trainer.train()
    measured = trainer.evaluate()
    assert trainer.accuracy_matrix[1].tolist() == [measured["eval_one_loss"], measured["eval_two_loss"]]
    assert trainer.task_callback.sequence.training()[0]["metric"] == "loss"
    card = (tmp_path / "README.md").read_text()
    assert "`loss` on each task (column)" in card
    assert "lower is better and a BWT above zero means forgetting" in card
    assert "type: loss" in card


def test_tasks_without_basis_cannot_be_followed_by_a_method_that_needs_one(tmp_path):
    make_trainer(tmp_path, tasks=("one",), eblora_config=EBLoRAConfig(method="ebo")).train()
    with pytest.raises(ValueError, match=r"one in .* were learnt by a method that keeps no basis"):
        make_trainer(tmp_path, tasks=("two",), sequence=tmp_path).train()
    make_trainer(tmp_path, tasks=("two",), sequence=tmp_path, eblora_config=EBLoRAConfig(method="lora")).train()


def test_what_is_published_comes_from_the_masters(tmp_path):
    """bf16 parameters hold rounded factors; the published adapter is orthonormal to float32."""
    model = get_peft_model(make_model("bert", dtype=torch.bfloat16), lora(r=3, **CONFIG), autocast_adapter_dtype=False)
    trainer = make_trainer(tmp_path, model=model, peft_config=None)
    trainer.train()
    basis = load_file(tmp_path / "tasks/00-one/subspace.safetensors")
    adapter = load_file(tmp_path / "tasks/01-two/adapter_model.safetensors")
    for key in [key for key in adapter if key.endswith("lora_A.weight")]:
        a = adapter[key].double()
        assert (a @ a.T - torch.eye(3)).abs().max() < 2e-6
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        assert (a @ basis[f"{name}.columns"].double()).abs().max() < 2e-7


def test_activation_checkpointing_gives_the_same_snapshot(tmp_path):
    snapshots = []
    for checkpointing in (False, True):
        model = make_model("bert", dropout=0.5)
        trainer = make_trainer(tmp_path / str(checkpointing), model=model)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
        snapshots.append(trainer.snapshot(make_text_data("bert"), seed=3))
    for name in snapshots[0]:
        torch.testing.assert_close(snapshots[0][name], snapshots[1][name], atol=1e-6, rtol=1e-4)


def test_drop_last_does_not_cut_the_snapshot(tmp_path):
    seen = []
    trainer = make_trainer(tmp_path, dataloader_drop_last=True, eblora_config=EBLoRAConfig(snapshot_fraction=0.2))
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kw: (
        seen.append(len(inputs["labels"])),
        compute_loss(model, inputs, **kw),
    )[1]
    trainer.snapshot(make_text_data("bert", size=35), seed=0)
    assert seen == [4, 3]
    assert trainer.args.dataloader_drop_last


def test_denormal_numbers_are_as_before(tmp_path):
    make_trainer(tmp_path, tasks=("one",)).train()
    assert (torch.tensor(1e-38) * 0.1).item() != 0.0


def test_more_arguments_that_are_refused(tmp_path):
    data = DatasetDict(train=make_text_data("bert"), test=make_text_data("bert"))
    loaded = make_model("bert")
    loaded._hf_peft_config_loaded = True  # as `loaded.add_adapter` leaves it, which wants the newest PEFT
    for overrides, words in (
        ({"train_dataset": data}, "DatasetDict with the splits train, test"),
        ({"args": make_arguments(tmp_path / "x", bf16_full_eval=True)}, "bf16_full_eval.*cast the model's weights"),
        ({"model": "bert-base"}, "got 'bert-base'"),
        ({"peft_config": {"r": 4}}, r"must be a peft.LoraConfig, got \{'r': 4\}"),
        ({"eblora_config": {}}, "must be an EBLoRAConfig"),
        ({"model": loaded}, "carries an adapter from `model.add_adapter`"),
        ({"peft_config": lora(init_lora_weights="orthogonal", **CONFIG)}, "starts from an update that is not zero"),
    ):
        with pytest.raises(ValueError, match=words):
            make_trainer(tmp_path, **overrides)
    assert make_trainer(tmp_path, train_dataset=[Task("a", data["train"])]).tasks.names == ["a"]
    assert make_trainer(tmp_path).bases == {}


def test_ten_tasks_fill_the_bases_and_every_one_still_learns(tmp_path):
    """With d_in = 32 and r = 4 the bases reach their cap of 28 columns; a direction is always left."""
    tasks = tuple(f"t{i}" for i in range(10))
    trainer = make_trainer(tmp_path, tasks=tasks, max_steps=3)
    trainer.train()
    widths = {basis.shape for basis in trainer.bases.values()}
    assert max(width for height, width in widths if height == 32) == 28
    assert all(width <= height - 4 for height, width in widths)
    for task in trainer.task_callback.sequence.tasks:
        adapter = load_file(Path(tmp_path) / task.folder / "adapter_model.safetensors")
        assert max(adapter[key].abs().max() for key in adapter if "lora_B" in key) > 1e-4


def test_other_layers_and_strays_show_before_training(tmp_path):
    make_trainer(tmp_path / "a", tasks=("one",), peft_config=lora(target_modules=["query"])).train()
    other = make_trainer(
        tmp_path / "a", tasks=("two",), sequence=tmp_path / "a", peft_config=lora(target_modules=["query", "value"])
    )
    with pytest.raises(ValueError, match=r"differ in bert.encoder.layer.0.attention.self.value, "):
        other.train()
    assert other.state.global_step == 0
    (tmp_path / "b" / "tasks" / "00-other").mkdir(parents=True)
    trainer = make_trainer(
        tmp_path / "b", tasks=("two",), sequence=tmp_path / "a", peft_config=lora(target_modules=["query"])
    )
    with pytest.raises(ValueError, match="holds 00-other"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_ranks_of_layers_whose_names_end_alike(tmp_path):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.fc = Inner(), nn.Linear(6, 6)

        def forward(self, x, labels=None):
            y = self.fc(self.inner.fc(x))
            return {"loss": (y - labels).square().mean(), "logits": y}

    data = [{"x": torch.randn(6), "labels": torch.randn(6)} for _ in range(8)]
    config = LoraConfig(r=3, target_modules=["fc"], rank_pattern={"^fc": 2})
    args = make_arguments(tmp_path, label_names=["labels"])
    torch.manual_seed(0)
    base = Outer()
    trainer = ContinualEBLoRATrainer(base, args, peft_config=config, train_dataset={"a": data, "b": data})
    trainer.train()
    state = load_file(tmp_path / "adapter_model.safetensors")
    ranks = {key: value.shape[0] for key, value in state.items() if "lora_A" in key}
    assert sorted(ranks.values()) == [4, 6]
    assert {layer.name: layer.rank for layer in trainer.layers} == {"inner.fc": 6, "fc": 4}


class DecayingLoss(ContinualEBLoRATrainer):
    """A loss that depends on where in the training it is."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        self.__dict__.setdefault("seen", []).append((self.state.global_step, self.state.max_steps))
        loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        return loss * (1.0 - 0.5 * self.state.global_step / self.state.max_steps)


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"max_steps": 4}, 4), ({"max_steps": -1, "num_train_epochs": 2.0, "gradient_accumulation_steps": 4}, 4)],
)
def test_a_loss_may_depend_on_the_step(tmp_path, options, steps):
    trainer = make_trainer(tmp_path, cls=DecayingLoss, eblora_config=EBLoRAConfig(observe_steps=0), **options)
    trainer.train()
    assert [task.steps for task in trainer.task_callback.sequence.tasks] == [steps, steps]
    assert {total for _, total in trainer.seen} == {steps}
    assert trainer.seen[0][0] == 0  # the snapshot at the start
    assert trainer.seen[-1][0] == steps  # the one at the end


def test_an_error_in_a_snapshot_says_so(tmp_path):
    class Fails(ContinualEBLoRATrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            if not model.training:
                raise KeyError("a weight of the loss")
            return super().compute_loss(model, inputs, return_outputs, **kwargs)

    with pytest.raises(KeyError) as caught:
        make_trainer(tmp_path, cls=Fails).train()
    assert "while a snapshot of the task was taken" in caught.value.__notes__[0]


# ---- messages ----


def test_a_list_of_data_sets_has_no_names(tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset is a list of 2 Dataset objects\. Give tasks names"):
        make_trainer(tmp_path, train_dataset=[make_text_data("bert"), make_text_data("bert", seed=1)])
    rows = list(make_text_data("bert"))
    assert len(make_trainer(tmp_path, train_dataset=rows).tasks.tasks[0].train_dataset) == len(rows)


def test_a_compiled_model_is_refused_with_the_argument_to_use(tmp_path):
    with pytest.raises(ValueError, match=r"before `torch\.compile`, and TrainingArguments\(torch_compile=True\)"):
        make_trainer(tmp_path, model=torch.compile(make_model("bert")))


def test_a_task_of_another_kind_of_input_is_named_before_the_first_is_learnt(tmp_path):
    pictures = Dataset.from_dict({"pixel_values": [[1.0, 2.0]] * 4})
    with pytest.raises(ValueError, match=r"'two' has the columns pixel_values, but the model takes .*input_ids"):
        make_trainer(tmp_path, train_dataset={"one": make_text_data("bert"), "two": pictures})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.9, 1.0])
def test_rows_whose_labels_are_all_ignored(tmp_path, share):
    """Batches of such rows alone have no mean loss."""
    data = make_text_data("llama", size=40)
    kept = round(40 * (1 - share))
    labels = [row.tolist() if i < kept else [-100] * len(row) for i, row in enumerate(data["labels"])]
    data = data.remove_columns("labels").add_column("labels", labels).with_format("torch")
    trainer = make_trainer(tmp_path, "llama", train_dataset=data, per_device_train_batch_size=2)
    if kept:
        trainer.train()
        assert all(torch.isfinite(x).all() for x in load_published(tmp_path)["root"].values())
    else:
        with pytest.raises(ValueError, match=r"all zero.*ignored"):
            trainer.train()


def test_a_base_model_is_described_by_what_differs(tmp_path):
    make_trainer(tmp_path).train()
    config = make_model("bert").config
    config.num_labels = 5
    other = type(make_model("bert"))(config)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification with 3 labels, .* with 5 labels"):
        make_trainer(tmp_path, model=other, tasks=("three",), sequence=tmp_path).train()
