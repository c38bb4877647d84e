"""Run under torchrun by test_processes.py: two tasks on every process, then each process writes what it holds."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig
from tests.conftest import lora, make_arguments, make_model, make_text_data

folder, per_device = Path(sys.argv[1]), int(sys.argv[2])
backend = {"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}
trainer = ContinualEBLoRATrainer(
    model=make_model("llama"),
    args=make_arguments(folder / "out", per_device_train_batch_size=per_device, max_steps=10, **backend),
    peft_config=lora(),
    train_dataset={name: make_text_data("llama", seed=i, size=32) for i, name in enumerate(("one", "two"))},
    eblora_config=EBLoRAConfig(snapshot_fraction=1.0, direction_lr=0.05, scale_lr=0.01),
)
trainer.train()
state = {f"factors.{key}": value for key, value in trainer.constraint.state_dict().items()}
state |= {f"bases.{key}": value for key, value in trainer.bases.items()}
save_file(
    {key: value.contiguous() for key, value in state.items()}, folder / f"rank{trainer.args.process_index}.safetensors"
)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
