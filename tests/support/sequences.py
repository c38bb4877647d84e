"""Published sequences of random adapters."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

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


def append(sequence: PublishedSequence, name: str, seed: int, extensions: dict | str | None = "some"):
    columns = orthonormal(32, 12, 7, torch.float32)[:, 4 * seed : 4 * seed + 4]
    if extensions == "some":
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


def rehash(folder) -> None:
    """Writes the sha256 of all files as they are now into the index, as one who means harm would."""
    path = Path(folder) / "eblora_sequence.json"
    index = json.loads(path.read_text())
    for files in (index["files"], *(task["files"] for task in index["tasks"])):
        for name in files:
            files[name] = hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(index))


def edit_json(path, **changes) -> None:
    path = Path(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path, change) -> None:
    """Writes what `change` makes of the tensors of a file, in place or as what it returns."""
    tensors = load_file(path)
    changed = change(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, path, {"format": "pt"})
