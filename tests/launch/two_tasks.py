"""Run under torchrun by test_processes.py: two tasks on every process, then each process writes what it holds."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig
from tests.conftest import lora, make_arguments, make_model, make_text_data

folder, per_device, method = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
held = {}


class Hold(TrainerCallback):
    """Keeps what this process has trained, before all processes read the published sequence."""

    def on_train_end(self, args, state, control, model, **kwargs):
        task = Path(args.output_dir).name
        held.update({f"{task}.{name}": p.detach().clone() for name, p in model.named_parameters() if "lora_" in name})


backend = {"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}
trainer = ContinualEBLoRATrainer(
    model=make_model("llama"),
    args=make_arguments(folder / "out", per_device_train_batch_size=per_device, max_steps=10, **backend),
    peft_config=lora(),
    train_dataset={name: make_text_data("llama", seed=i, size=32) for i, name in enumerate(("one", "two"))},
    eblora_config=EBLoRAConfig(method=method, snapshot_fraction=1.0, direction_lr=0.05, scale_lr=0.01),
    callbacks=[Hold()],
)
trainer.train()
if trainer.constraint is not None:
    held |= {f"constraint.{key}": value for key, value in trainer.constraint.state_dict().items()}
held |= {f"bases.{key}": value for key, value in trainer.bases.items()}
save_file(
    {key: value.contiguous() for key, value in held.items()}, folder / f"rank{trainer.args.process_index}.safetensors"
)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
