"""Published sequences of random adapters."""

import torch

from eblora_hf import PublishedSequence
from eblora_hf.memory.basis import BasisExtension
from eblora_hf.published.identity import describe_base_model

from .tiny import lora, make_model, orthonormal

LAYER = "bert.encoder.layer.0.attention.self.query"


def adapter(seed: int) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{LAYER}"
    return {
        f"{prefix}.lora_A.weight": orthonormal(32, 4, seed, torch.float32).T.contiguous(),
        f"{prefix}.lora_B.weight": 0.1 * orthonormal(32, 4, seed + 9, torch.float32),
    }


def append(sequence: PublishedSequence, name: str, seed: int, extensions: dict | None = None):
    columns = orthonormal(32, 12, 7, torch.float32)[:, 4 * seed : 4 * seed + 4]
    if extensions is None:
        extensions = {LAYER: BasisExtension(columns, 0.99)}
    return sequence.append(
        name,
        adapter(seed),
        lora(target_modules=["query"]),
        extensions,
        steps=5,
        metrics={name: 0.5},
        training={"seed": seed},
    )


def new_sequence(folder) -> PublishedSequence:
    return PublishedSequence(folder, describe_base_model(make_model("bert")))
