"""Kinds of tasks x precisions: preferences, rewards, and heads of the tasks' own (docs/support.md)."""

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, RewardConfig

from eblora_hf import (
    ContinualEBLoRADPOTrainer,
    ContinualEBLoRARewardTrainer,
    ContinualEBLoRATrainer,
    EBLoRAConfig,
    PublishedSequence,
    Task,
    TaskSequence,
)
from eblora_hf.adapters.layers import keep_differentiable

from ..support.contract import AUTOCAST, tokenizer
from ..support.tables import TABLES, outcome, report
from ..support.tiny import lora, make_arguments

PRECISIONS = ["float32", "bf16 autocast", "bf16 weights", "4-bit base"]
BASE = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 2}
DISTILBERT = {"vocab_size": 40, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
MODELS = {
    "Llama, DPOTrainer": (transformers.LlamaForCausalLM, BASE | IDS),
    "Llama, RewardTrainer": (transformers.LlamaForSequenceClassification, BASE | IDS | {"num_labels": 1}),
    "Qwen3, DPOTrainer": (transformers.Qwen3ForCausalLM, BASE | IDS | {"head_dim": 16, "num_key_value_heads": 2}),
    "GPT-2, DPOTrainer": (transformers.GPT2LMHeadModel, GPT2 | {"eos_token_id": 3}),
    "GPT-2, RewardTrainer": (
        transformers.GPT2ForSequenceClassification,
        GPT2 | {"eos_token_id": 3, "pad_token_id": 0, "num_labels": 1},
    ),
}
CLASSIFIERS = {
    "BERT": (transformers.BertForSequenceClassification, BASE),
    "RoBERTa": (transformers.RobertaForSequenceClassification, BASE | {"max_position_embeddings": 64}),
    "DistilBERT": (transformers.DistilBertForSequenceClassification, DISTILBERT),
    "Llama": (transformers.LlamaForSequenceClassification, BASE | IDS),
}
HEADS = ("shared", "per-task", "grow")
SOME_FAST = [pytest.param(p, marks=[] if p == "float32" else pytest.mark.slow) for p in PRECISIONS]


def load(kind, options, precision, folder, **changes):
    torch.manual_seed(0)
    model = kind(kind.config_class(**options | changes))
    if precision != "4-bit base":
        return model.to(torch.bfloat16 if precision == "bf16 weights" else torch.float32)
    model.save_pretrained(folder)
    heads = [name for name in ("score", "classifier", "pre_classifier") if hasattr(model, name)]
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=heads or ["lm_head"]
    )
    model = kind.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)  # as TRL has it
    keep_differentiable(model)
    return model


def assert_published_is_on_the_model(trainer, stock):
    orthonormality, restriction = trainer.constraint.deviation()
    assert orthonormality <= 2e-6
    assert restriction <= 2e-7
    inputs = {"input_ids": torch.arange(4, 28).view(2, 12)}
    keep_differentiable(stock)
    with torch.no_grad():
        found, expected = (model.eval()(**inputs).logits.float() for model in (trainer.model, stock))
    torch.testing.assert_close(found, expected, atol=3e-2, rtol=3e-2)


def prefers(name, precision, folder):
    kind, options = MODELS[name]
    reward = "Reward" in name
    Continual = ContinualEBLoRARewardTrainer if reward else ContinualEBLoRADPOTrainer
    kept = make_arguments(folder / "out", max_steps=2, **AUTOCAST.get(precision, {})).to_dict()
    kept = {key: kept[key] for key in make_arguments(folder / "out").to_dict() if key != "gradient_checkpointing"}
    pairs = {"chosen": ["w5 w6 w7"] * 8, "rejected": ["w8 w9"] * 8} | ({} if reward else {"prompt": ["w4 w5 "] * 8})
    trainer = Continual(
        model=load(kind, options, precision, folder / "base"),
        args=(RewardConfig if reward else DPOConfig)(**kept),
        train_dataset={task: Dataset.from_dict(pairs) for task in ("one", "two")},
        processing_class=tokenizer(),
        peft_config=lora(task_type="SEQ_CLS" if reward else "CAUSAL_LM"),
    )
    trainer.train()
    stock = PeftModel.from_pretrained(load(kind, options, precision, folder / "base"), folder / "out")
    assert_published_is_on_the_model(trainer, stock)


@pytest.mark.parametrize("precision", SOME_FAST)
@pytest.mark.parametrize("name", MODELS)
def test_preferences(tmp_path, record_property, name, precision):
    report(
        record_property, TABLES["preferences"], name, precision, outcome(lambda: prefers(name, precision, tmp_path))
    )


def classifies(name, heads, precision, folder):
    kind, options = CLASSIFIERS[name]
    labels = {"one": ["a", "b", "c"], "two": ["d", "e", "f"] if heads == "shared" else ["d", "e"]}
    rng, tasks = np.random.default_rng(0), []
    for task, own in labels.items():
        tokens = rng.integers(4, 40, size=(12, 8))
        rows = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": tokens[:, 0] % len(own)}
        tasks.append(Task(task, Dataset.from_dict(rows).with_format("torch"), labels=own))
    trainer = ContinualEBLoRATrainer(
        model=load(kind, options, precision, folder / "base", num_labels=3),
        args=make_arguments(folder / "out", max_steps=2, **AUTOCAST.get(precision, {})),
        eblora_config=EBLoRAConfig(heads=heads),
        train_dataset=TaskSequence(tasks),
        peft_config=lora(task_type="SEQ_CLS"),
    )
    trainer.train()
    last = len(PublishedSequence.open(folder / "out").labels_of_head("two"))
    base = load(kind, options, precision, folder / "again", num_labels=last)
    assert_published_is_on_the_model(trainer, PeftModel.from_pretrained(base, folder / "out"))


@pytest.mark.parametrize("precision", SOME_FAST)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_heads(tmp_path, record_property, name, heads, precision):
    result = outcome(lambda: classifies(name, heads, precision, tmp_path))
    report(record_property, TABLES["heads"], f"{name}: {heads}", precision, result)
