"""Tiny models of many architectures, from config, with data and an adapter for each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import LoraConfig

VOCABULARY, LENGTH, ROWS = 64, 8, 12
TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 3}


@dataclass(frozen=True)
class Architecture:
    """
    A model to train.

    Args:
        config (`Callable`): Makes its configuration.
        model (`type`): Its class.
        inputs (`Callable`): Draws a row of its inputs and labels.
        lora (`dict`): Options of the `LoraConfig` beside the rank.
        trainer (`str`): `"Trainer"`, `"Seq2SeqTrainer"` or `"SFTTrainer"`.
        extra (`dict`): What the collator adds to every batch.
        blocks (`list[str]`, *optional*): The classes that FSDP2 shards, where accelerate cannot tell them.
    """

    config: Callable[[], Any]
    model: type
    inputs: Callable[[torch.Generator], dict[str, torch.Tensor]]
    lora: dict[str, Any] = field(default_factory=dict)
    trainer: str = "Trainer"
    extra: dict[str, Any] = field(default_factory=dict)
    blocks: list[str] | None = None

    def make(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        torch.manual_seed(0)
        return self.model(self.config()).to(dtype)

    def data(self, seed: int) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return [self.inputs(generator) for _ in range(ROWS)]

    def batch(self, seed: int = 9) -> dict[str, Any]:
        return self.collate(self.data(seed)[:4])

    def collate(self, rows: list[dict]) -> dict[str, Any]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]} | self.extra

    def heads(self) -> list[str]:
        """Full names of the `modules_to_save`."""
        names = self.lora.get("modules_to_save", ())
        return [name for name, _ in self.make().named_modules() if name.rpartition(".")[2] in names]

    def peft_config(self) -> LoraConfig:
        return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | self.lora))


def tokens(generator: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (length,), generator=generator)


def classified(generator: torch.Generator) -> dict:
    ids = tokens(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 3}


def generated(generator: torch.Generator) -> dict:
    ids = tokens(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def translated(generator: torch.Generator) -> dict:
    return {"input_ids": tokens(generator), "labels": tokens(generator, 5)}


def pictured(generator: torch.Generator) -> dict:
    return {
        "pixel_values": torch.rand(3, 8, 8, generator=generator),
        "labels": torch.randint(3, (), generator=generator),
    }


def captioned(generator: torch.Generator) -> dict:
    ids = torch.cat([tokens(generator, LENGTH - 1), torch.tensor([VOCABULARY - 1])])  # CLIP pools at the last token
    return {"pixel_values": torch.rand(3, 8, 8, generator=generator), "input_ids": ids}


def shown(generator: torch.Generator) -> dict:
    """Four patches of an image, then a text about it."""
    ids = torch.cat([torch.full((4,), 1), tokens(generator)])
    labels = ids.masked_fill(ids == 1, -100)
    return {
        "pixel_values": torch.rand(3, 8, 8, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
    }


def clip_vision() -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(**TEXT, **IMAGE, projection_dim=32)


HEAD = {"modules_to_save": ["classifier"], "exclude_modules": ["classifier"]}
CLASSES = {"num_labels": 3}

ARCHITECTURES = {
    "BERT": Architecture(
        lambda: transformers.BertConfig(vocab_size=VOCABULARY, **TEXT, **CLASSES),
        transformers.BertForSequenceClassification,
        classified,
        HEAD,
        blocks=["BertLayer"],
    ),
    "ModernBERT": Architecture(
        lambda: transformers.ModernBertConfig(
            vocab_size=VOCABULARY,
            pad_token_id=0,
            cls_token_id=1,
            sep_token_id=2,
            bos_token_id=1,
            eos_token_id=2,
            **TEXT,
            **CLASSES,
        ),
        transformers.ModernBertForSequenceClassification,
        classified,
        HEAD,
        blocks=["ModernBertEncoderLayer"],
    ),
    "Llama": Architecture(
        lambda: transformers.LlamaConfig(vocab_size=VOCABULARY, **TEXT), transformers.LlamaForCausalLM, generated
    ),
    "Llama, SFT": Architecture(
        lambda: transformers.LlamaConfig(vocab_size=VOCABULARY, **TEXT),
        transformers.LlamaForCausalLM,
        generated,
        trainer="SFTTrainer",
    ),
    "GPT-2": Architecture(
        lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=2, n_positions=16),
        transformers.GPT2LMHeadModel,
        generated,
    ),
    "Qwen3": Architecture(
        lambda: transformers.Qwen3Config(vocab_size=VOCABULARY, head_dim=32, num_key_value_heads=1, **TEXT),
        transformers.Qwen3ForCausalLM,
        generated,
    ),
    "Phi-3, fused linears": Architecture(
        lambda: transformers.Phi3Config(vocab_size=VOCABULARY, pad_token_id=0, **TEXT),
        transformers.Phi3ForCausalLM,
        generated,
    ),
    "Mixtral, attention": Architecture(
        lambda: transformers.MixtralConfig(vocab_size=VOCABULARY, num_local_experts=4, num_key_value_heads=1, **TEXT),
        transformers.MixtralForCausalLM,
        generated,
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    ),
    "Mixtral, experts": Architecture(
        lambda: transformers.MixtralConfig(vocab_size=VOCABULARY, num_local_experts=4, num_key_value_heads=1, **TEXT),
        transformers.MixtralForCausalLM,
        generated,
    ),
    "T5": Architecture(
        lambda: transformers.T5Config(
            vocab_size=VOCABULARY, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, decoder_start_token_id=0
        ),
        transformers.T5ForConditionalGeneration,
        translated,
        trainer="Seq2SeqTrainer",
    ),
    "ViT": Architecture(
        lambda: transformers.ViTConfig(**TEXT, **IMAGE, **CLASSES),
        transformers.ViTForImageClassification,
        pictured,
        HEAD,
        blocks=["ViTLayer"],
    ),
    "CLIP": Architecture(
        lambda: transformers.CLIPConfig(
            text_config={
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 16,
                "eos_token_id": VOCABULARY - 1,
                **TEXT,
            },
            vision_config=clip_vision().to_dict(),
            projection_dim=32,
        ),
        transformers.CLIPModel,
        captioned,
        extra={"return_loss": True},
    ),
    "LLaVA, language model": Architecture(
        lambda: transformers.LlavaConfig(
            vision_config=clip_vision(),
            text_config=transformers.LlamaConfig(vocab_size=VOCABULARY, **TEXT),
            image_token_id=1,
            vision_feature_layer=-1,
        ),
        transformers.LlavaForConditionalGeneration,
        shown,
        {
            "target_modules": r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
            "modules_to_save": ["multi_modal_projector"],
        },
        blocks=["LlamaDecoderLayer"],
    ),
}
