"""Tiny models from config and tiny data: nothing is downloaded."""

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments


def make_model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> torch.nn.Module:
    """A tiny transformers model with a loss, from config."""
    torch.manual_seed(seed)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=60,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=48,
            num_labels=3,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        model = transformers.BertForSequenceClassification(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
        )
        model = transformers.LlamaForCausalLM(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=60,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=32,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
        )
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "t5":
        config = transformers.T5Config(
            vocab_size=60, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, dropout_rate=dropout
        )
        config.decoder_start_token_id = 0
        model = transformers.T5ForConditionalGeneration(config)
    elif kind == "vit":
        from eblora_hf.benchmark.digits import new_model

        model = new_model()
    else:
        raise ValueError(kind)
    return model.to(dtype)


def make_text_data(kind: str, seed: int = 0, size: int = 24, length: int = 8) -> Dataset:
    """Random token sequences with labels: three classes for "bert", the tokens themselves for a causal LM."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 60, size=(size, length))
    labels = tokens if kind != "bert" else (tokens[:, 0] + seed) % 3
    return Dataset.from_dict(
        {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist(), "labels": labels.tolist()}
    ).with_format("torch")


def make_arguments(folder, **overrides) -> TrainingArguments:
    """Arguments of a short, silent run on the CPU."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(defaults | overrides))


def lora(**overrides) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | overrides))


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def orthonormal(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0].to(dtype)
