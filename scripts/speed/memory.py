"""The highest memory of a whole run, ours over stock LoRA, and what it leaves on disk: two blocks of a 7B model."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from eblora_hf import ContinualEBLoRATrainer
from eblora_hf.adapters.layers import find_layers

from .models import make_llama
from .snapshot import peak_memory
from .timing import in_own_process

_BLOCKS, _TOKENS, _ROWS = 2, 256, 24
CONTENDERS = ("lora", "ours")


def measure_memory(size: str, contender: str, device: torch.device) -> dict[str, Any]:
    """In a process of its own, because the peak of a process never falls again."""
    return in_own_process("speed.memory", size, contender, str(device))


def with_extra(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what each takes beyond stock LoRA, over the adapted weights in 16 bits."""
    stock = next(row for row in rows if row["contender"] == "lora")
    return [row | {"extra_over_weights": (row["peak"] - stock["peak"]) / row["weights"]} for row in rows]


def _measure(size: str, contender: str, device: torch.device) -> dict[str, Any]:
    model = make_llama(size, device, layers=_BLOCKS).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 8192, (_ROWS, _TOKENS), generator=generator)]
    lora = LoraConfig(r=16, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        )
        if contender == "lora":
            model = get_peft_model(model, lora)
            trainer = Trainer(model, args, train_dataset=rows)
        else:
            trainer = ContinualEBLoRATrainer(model, args, train_dataset={"one": rows}, peft_config=lora)
        layers = find_layers(trainer.model, "default")
        weights = sum(2 * layer.d_out * layer.d_in for layer in layers)
        peak_memory(device, reset=True)  # the model was built in float32
        trainer.train()
        sizes = {path.name: path.stat().st_size for path in Path(folder).glob("tasks/00-one/*.safetensors")}
        row = {"what": "memory", "set": size, "contender": contender, "peak": peak_memory(device), "weights": weights}
        if sizes:
            row["bases_over_adapter"] = sizes["subspace.safetensors"] / sizes["adapter_model.safetensors"]
        return row


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(json.dumps(_measure(sys.argv[1], sys.argv[2], torch.device(sys.argv[3]))))
