"""Trainers over tiny models, runs that are interrupted, and what they leave on disk."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from eblora_hf import ContinualEBLoRATrainer

from .tiny import lora, make_arguments, make_model, make_text_data

CONFIG = {"exclude_modules": ["classifier"]}


def make_trainer(folder, kind="bert", tasks=("one", "two"), cls=ContinualEBLoRATrainer, **overrides):
    arguments = {key: overrides.pop(key) for key in list(overrides) if key in make_arguments(folder).to_dict()}
    train = {name: make_text_data(kind, seed=i) for i, name in enumerate(tasks)}
    defaults = {
        "model": make_model(kind),
        "args": make_arguments(folder, **arguments),
        "peft_config": lora(**CONFIG) if kind == "bert" else lora(),
        "train_dataset": train,
    }
    return cls(**(defaults | overrides))


def load_published(folder):
    """Everything a run leaves behind that must not depend on interruptions."""
    files = {str(p.relative_to(folder)): load_file(p) for p in sorted(Path(folder).glob("tasks/*/*.safetensors"))}
    return files | {"root": load_file(Path(folder) / "adapter_model.safetensors")}


def assert_same_files(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys(), name
        for key in a[name]:
            assert torch.equal(a[name][key], b[name][key]), (name, key)


def get_stock_deltas(kind, folder):
    """ΔW of every layer as plain PEFT sees it, stored like the weight."""
    model = PeftModel.from_pretrained(make_model(kind), folder)
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "get_delta_weight")
    }


class InterruptionError(Exception):
    pass


class InterruptAt(TrainerCallback):
    def __init__(self, task: str, step: int):
        self.task, self.step = task, step

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.task) and state.global_step == self.step:
            raise InterruptionError
