"""Llama models from configuration, and constraints around their adapters."""

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from eblora_hf.adapters.factors import Factors
from eblora_hf.adapters.layers import find_layers
from eblora_hf.manifold.constraint import StiefelConstraint

from .timing import orthonormal

# hidden size, feed-forward size, layers, heads, heads of keys and values
_SIZES = {
    "tiny": (32, 48, 2, 2, 2),
    "small": (512, 1376, 6, 8, 8),
    "97m": (768, 2048, 12, 12, 12),
    "1b": (2048, 8192, 16, 32, 8),
    "7b": (4096, 11008, 32, 32, 32),
}


def make_llama(size: str, device: torch.device, layers: int | None = None) -> transformers.LlamaForCausalLM:
    """A Llama with random weights; `layers` shortens it."""
    hidden, feed_forward, depth, heads, key_heads = _SIZES[size]
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=16384,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config)


def make_bert(size: str, device: torch.device, classes: int) -> transformers.BertForSequenceClassification:
    """A BERT of the same size."""
    hidden, feed_forward, depth, heads, _ = _SIZES[size]
    config = transformers.BertConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=16384,
        num_labels=classes,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.BertForSequenceClassification(config)


def with_lora(model: torch.nn.Module, rank: int) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))


def constrain(model: PeftModel, optimizer: torch.optim.Optimizer, columns: int) -> StiefelConstraint:
    """Our constraint from random factors, under a random basis of so many columns in every layer."""
    layers, factors, bases = find_layers(model, "default"), {}, {}
    for layer in layers:
        device = layer.weight.device
        q = orthonormal(layer.d_in, columns + layer.rank, device)
        bases[layer.name] = q[:, :columns]
        factors[layer.name] = Factors(orthonormal(layer.d_out, layer.rank, device), q[:, columns:], -0.01)
    return StiefelConstraint(
        optimizer,
        layers,
        factors,
        bases if columns else None,
        direction_lr=0.02,
        scale_lr=1e-3,
        tangent="orthogonal",
    )


def batch_of(tokens: int, device: torch.device) -> torch.Tensor:
    """Random ids, one sequence of so many tokens."""
    return torch.randint(0, 8192, (1, tokens), device=device)
