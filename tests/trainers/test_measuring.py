"""Evaluating and predicting without training, and what a list of tasks means to a sequence that has some."""

import numpy as np
import pytest
import torch

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig, PublishedSequence, Task, TaskSequence, load_sequence

from ..support.tiny import accuracy, lora, make_arguments, make_model, make_text_data
from ..support.trainers import assert_same_files, load_published, make_trainer

SETS = {name: make_text_data("bert", seed=i) for i, name in enumerate(("one", "two", "three"))}


@pytest.fixture
def published(tmp_path):
    trainer = make_trainer(
        tmp_path / "out", peft_config=lora(task_type="SEQ_CLS"), eval_dataset=SETS, compute_metrics=accuracy
    )
    trainer.train()
    return tmp_path / "out", trainer.accuracy_matrix[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_evaluation_without_training_is_of_the_sequence(tmp_path, published, dtype):
    folder, _ = published
    model = make_model("bert", dtype=dtype)
    trainer = ContinualEBLoRATrainer(
        model=model,
        args=make_arguments(tmp_path / "new"),
        sequence=folder,
        eval_dataset=SETS,
        compute_metrics=accuracy,
    )
    measured = trainer.evaluate()
    loaded = load_sequence(make_model("bert", dtype=dtype), folder)
    for name, data in SETS.items():
        with torch.no_grad():
            answers = loaded(**data[:]).logits
        right = (answers.argmax(-1) == data["labels"][:]).double().mean()
        assert measured[f"eval_{name}_accuracy"] == float(right)
        torch.testing.assert_close(torch.tensor(trainer.predict(data).predictions), answers.float(), atol=1e-2, rtol=0)
    assert not (tmp_path / "new/eblora_sequence.json").exists()
    assert trainer.accuracy_matrix.shape == (2, 2)


def test_a_trainer_that_has_measured_trains_as_one_that_has_not(tmp_path, published):
    folder, _ = published

    def go_on(to, measure):
        model = make_model("bert")
        trainer = ContinualEBLoRATrainer(
            model=model, args=make_arguments(to), sequence=folder, train_dataset={"three": SETS["three"]}
        )
        if measure:
            trainer.evaluate(SETS["one"])
        trainer.train()

    go_on(tmp_path / "measured", True)
    go_on(tmp_path / "not", False)
    assert_same_files(load_published(tmp_path / "measured"), load_published(tmp_path / "not"))


def test_a_list_of_tasks_says_what_shall_be_learnt_in_the_end(tmp_path, published, caplog):
    folder, _ = published
    model = make_model("bert")
    options = {"peft_config": lora(task_type="SEQ_CLS"), "train_dataset": SETS, "sequence": folder}
    ContinualEBLoRATrainer(model=model, args=make_arguments(folder), **options).train()
    assert PublishedSequence.open(folder).names == ["one", "two", "three"]
    before = load_published(folder)
    ContinualEBLoRATrainer(model=make_model("bert"), args=make_arguments(folder), **options).train()
    assert "There is nothing to learn" in caplog.text
    assert_same_files(before, load_published(folder))


@pytest.mark.parametrize("again", [{"sequence": True}, {"resume": True}], ids=["passed-over", "resumed"])
def test_a_finished_sequence_of_one_task_is_on_the_model_in_another_process(tmp_path, again):
    data = {"one": SETS["one"]}
    first = make_trainer(tmp_path, train_dataset=data, eval_dataset=data)
    first.train()
    options = {"sequence": tmp_path} if "sequence" in again else {}
    second = make_trainer(tmp_path, train_dataset=data, eval_dataset=data, **options)
    second.train(resume_from_checkpoint="resume" in again)
    assert second.evaluate()["eval_one_loss"] == pytest.approx(first.evaluate()["eval_one_loss"], rel=1e-5)
    assert second.evaluate()["eval_one_loss"] != pytest.approx(make_trainer(tmp_path).evaluate(data)["eval_one_loss"])


@pytest.mark.parametrize("heads", ["per-task", "grow"])
def test_nor_are_its_labels_lost(tmp_path, heads):
    def learn(**options):
        tasks = TaskSequence(
            [Task("one", SETS["one"], labels=["a", "b", "c"]), Task("two", SETS["two"], labels=["d", "e", "f", "g"])]
        )
        trainer = ContinualEBLoRATrainer(
            model=make_model("bert"),
            args=make_arguments(tmp_path),
            peft_config=lora(),
            train_dataset=tasks,
            eval_dataset={"one": SETS["one"], "two": SETS["two"]},
            eblora_config=EBLoRAConfig(heads=heads),
            **options,
        )
        trainer.train()
        return trainer

    first, second = learn(), learn(sequence=tmp_path)
    for name in ("one", "two"):
        assert second.evaluate()[f"eval_{name}_loss"] == pytest.approx(first.evaluate()[f"eval_{name}_loss"], rel=1e-4)


def test_a_list_of_rows_is_one_task(tmp_path, published):
    folder, _ = published
    trainer = make_trainer(
        folder,
        peft_config=lora(task_type="SEQ_CLS"),
        sequence=folder,
        task_name="one",
        train_dataset=list(SETS["three"]),
    )
    with pytest.raises(ValueError, match=r"already has the task\(s\) one"):
        trainer.train()


def test_a_run_without_evaluation_is_not_told_what_it_did_not_measure(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert all(np.isnan(value) for value in trainer.continual_metrics().values())
    assert "measured" not in caplog.text


def test_nothing_to_train_is_said(tmp_path, published):
    folder, _ = published
    trainer = ContinualEBLoRATrainer(model=make_model("bert"), args=make_arguments(tmp_path / "new"), sequence=folder)
    with pytest.raises(ValueError, match="Training needs a train_dataset, got none"):
        trainer.train()


def test_the_sequence_of_another_model_is_not_measured(tmp_path, published):
    folder, _ = published
    trainer = ContinualEBLoRATrainer(
        model=make_model("bert", seed=1), args=make_arguments(tmp_path / "new"), sequence=folder, eval_dataset=SETS
    )
    with pytest.raises(ValueError, match="other values"):
        trainer.evaluate()


def test_without_a_sequence_it_is_the_model_as_it_is(tmp_path):
    trainer = make_trainer(tmp_path)
    predictions = trainer.predict(SETS["one"]).predictions
    with torch.no_grad():
        np.testing.assert_allclose(predictions, make_model("bert").eval()(**SETS["one"][:]).logits, atol=1e-6)
