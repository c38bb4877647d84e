"""What is particular to TRL's SFTTrainer."""

import pytest
from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig

from eblora_hf import ContinualEBLoRASFTTrainer, EBLoRAConfig, PublishedSequence

from ..support.architectures import ARCHITECTURES
from ..support.contract import tokenizer
from ..support.tiny import lora, make_arguments

LLAMA = ARCHITECTURES["Llama, SFT"]
TEXT = Dataset.from_dict({"text": [f"w{4 + i} w{9 + i} w{20 + i} w7" for i in range(12)]})
COMPLETIONS = Dataset.from_dict(
    {"prompt": [f"w{4 + i} w{9 + i}" for i in range(12)], "completion": [f" w{20 + i} w7" for i in range(12)]}
)


def make_trainer(folder, **overrides):
    arguments = {key: overrides.pop(key) for key in list(overrides) if key in SFTConfig.__dataclass_fields__}
    args = SFTConfig(**make_arguments(folder / "out", max_steps=2).to_dict() | arguments)
    defaults = {"model": LLAMA.make(), "args": args, "peft_config": lora(), "processing_class": tokenizer()}
    return ContinualEBLoRASFTTrainer(**(defaults | overrides))


def test_every_task_is_prepared_and_evaluated(tmp_path):
    """As SFTTrainer prepares its one: tokens, and labels of the completions alone."""
    data = {"one": COMPLETIONS, "two": COMPLETIONS.select(range(6))}
    trainer = make_trainer(tmp_path, train_dataset=data, eval_dataset=data)
    for task in trainer.tasks:
        for dataset in (task.train_dataset, task.eval_dataset):
            assert len(dataset) == len(data[task.name])
            assert dataset[0]["labels"][:2] == [-100, -100]
            assert dataset[0]["labels"][2:] == dataset[0]["input_ids"][2:]
    trainer.train()
    assert PublishedSequence.open(tmp_path / "out").names == ["one", "two"]
    assert {"eval_one_loss", "eval_two_loss"} <= {key for entry in trainer.state.log_history for key in entry}


def test_formats_that_differ_need_a_word(tmp_path):
    data = {"one": TEXT, "two": COMPLETIONS}
    with pytest.raises(ValueError, match=r"tasks two have prompts and completions .*completion_only_loss"):
        make_trainer(tmp_path, train_dataset=data)
    trainer = make_trainer(tmp_path, train_dataset=data, completion_only_loss=False)
    assert -100 not in trainer.tasks.tasks[1].train_dataset[0]["labels"]


def test_a_model_by_its_path_with_options(tmp_path):
    LLAMA.make().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    args = {"model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = make_trainer(tmp_path, model=str(tmp_path / "base"), train_dataset=TEXT, processing_class=None, **args)
    assert {layer.weight.dtype for layer in trainer.layers} == {LLAMA.make().lm_head.weight.bfloat16().dtype}
    trainer.train()
    PeftModel.from_pretrained(LLAMA.make(), tmp_path / "out")


def test_a_second_run_appends_and_a_snapshot_is_not_logged(tmp_path):
    make_trainer(tmp_path, train_dataset=TEXT, task_name="one").train()
    config = EBLoRAConfig(snapshot_fraction=1.0)
    trainer = make_trainer(
        tmp_path, train_dataset=COMPLETIONS, task_name="two", sequence=tmp_path / "out", eblora_config=config
    )
    trainer.snapshot(trainer.tasks.tasks[0].train_dataset, seed=0)
    assert not any(trainer._metrics["eval"].values())
    trainer.train()
    assert PublishedSequence.open(tmp_path / "out").names == ["one", "two"]


def test_an_anchor_of_text(tmp_path):
    """It is prepared as the tasks are, and held at the positions of its tokens."""
    anchor = Dataset.from_dict({"text": [f"w{30 + i} w{5 + i}" for i in range(6)]})
    options = {"logging_strategy": "steps", "logging_steps": 1}
    trainer = make_trainer(tmp_path, train_dataset={"one": TEXT, "two": TEXT}, anchor=anchor, **options)
    trainer.train()
    values = [entry["anchor_loss"] for entry in trainer.state.log_history if "anchor_loss" in entry]
    assert len(values) == 4
    assert all(value > 0.0 for value in values)
    for part in trainer._anchor_steps[0]:
        assert len(part.before_task.positions) == int(part.inputs["attention_mask"].sum())
    assert PublishedSequence.open(tmp_path / "out").training()[0]["anchor"]["rows"] == 6
