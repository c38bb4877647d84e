"""
Run by test_processes.py, under torchrun or alone: two tasks on every process, which then writes what it holds.

The argument is JSON: `folder`, `per_device`, `method`, and if wanted `shard` (FSDP2), `steps` of a task, `dtype`,
`rows` of data, `anchor` rows in a step, `head_rate` of a trained head, `interrupt` at a step of the second task,
`resume`, `best` to load the best checkpoint, `unseeded` models, `drift` of one process, or `stock`: plain LoRA by the
stock Trainer, on the first task.
"""

import json
import os
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig
from eblora_hf.adapters.sharding import whole
from tests.launch.fsdp2 import FSDP2OnCPU
from tests.support.tiny import lora, make_arguments, make_model, make_text_data

options = json.loads(sys.argv[1])
folder, held = Path(options["folder"]), {}


class Sharded(FSDP2OnCPU, ContinualEBLoRATrainer):
    pass


class Hold(TrainerCallback):
    """Keeps what this process has trained, before all processes read the published sequence."""

    def on_train_end(self, args, state, control, model, **kwargs):
        task = Path(args.output_dir).name
        parameters = [(name, p) for name, p in model.named_parameters() if "lora_" in name and "earlier" not in name]
        held.update({f"{task}.{name}": whole(p.detach()).clone() for name, p in parameters})
        if options.get("drift") and args.process_index == 1:
            trainer.constraint.factors()["model.layers.1.mlp.up_proj"].U[0, 0] += 1e-6


class Interrupt(TrainerCallback):
    """Ends the process in the middle of the second task, after a checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if Path(args.output_dir).name == "two" and state.global_step == options["interrupt"]:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        os._exit(0)


def make_trainer():
    backend = {"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}
    best = {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch"}
    args = make_arguments(
        folder / "out",
        per_device_train_batch_size=options["per_device"],
        max_steps=options.get("steps", 10),
        lr_scheduler_type="cosine",
        **backend,
        **(best if options.get("best") else {}),
    )
    seed = int(os.environ.get("RANK", 0)) if options.get("unseeded") else 0
    model = make_model("llama", seed, dtype=getattr(torch, options.get("dtype", "float32")))
    data = {
        name: make_text_data("llama", seed=i, size=options.get("rows", 32)) for i, name in enumerate(("one", "two"))
    }
    if options.get("stock"):
        return Trainer(model=get_peft_model(model, lora()), args=args, train_dataset=data["one"], callbacks=[Hold()])
    snapshots = {} if options.get("observe") else {"snapshot_fraction": 1.0}
    rate, anchored = options.get("head_rate"), options.get("anchor", 8)
    own = {"anchor_samples": anchored, "head_learning_rate": rate}
    config = EBLoRAConfig(method=options["method"], direction_lr=0.05, scale_lr=0.01, **own, **snapshots)
    return (Sharded if options.get("shard") else ContinualEBLoRATrainer)(
        model=model,
        args=args,
        peft_config=lora(modules_to_save=["lm_head"]) if rate else lora(),
        train_dataset=data,
        eval_dataset=data if options.get("best") else None,
        eblora_config=config,
        anchor=make_text_data("llama", seed=9, size=16) if "anchor" in options else None,
        callbacks=[Hold(), *([Interrupt()] if "interrupt" in options else [])],
    )


trainer = make_trainer()
trainer.train(resume_from_checkpoint=True if options.get("resume") else None)
if getattr(trainer, "constraint", None) is not None:
    held |= {f"constraint.{key}": value for key, value in trainer.constraint.state_dict().items()}
held |= {f"bases.{key}": value for key, value in getattr(trainer, "bases", {}).items()}
trainer.save_model(str(folder / "saved"))
rank = trainer.args.process_index
save_file({key: value.contiguous() for key, value in held.items()}, folder / f"rank{rank}.safetensors")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
