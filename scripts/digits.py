"""
Two measurements on the embedded digits that the README quotes, as means over the seeds 0, 1 and 2.

    python scripts/digits.py heads       labels of the tasks' own: a head per task, or one that grows
    python scripts/digits.py adoption    a LoRA of stock Trainer + PEFT as the first task, with and without its data
"""

import argparse
import contextlib
import copy
import tempfile
from unittest import mock

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer

from eblora_hf import ContinualEBLoRATrainer, EBLoRAConfig, Task, TaskSequence
from eblora_hf.benchmark.digits import Digits, DigitsDataset, load_digits, pretrain, steady_cpu
from eblora_hf.benchmark.protocol import training_arguments
from eblora_hf.benchmark.transformations import PROTOCOL_TASKS, transformation
from eblora_hf.trainers.beginning import BeginningMixin
from eblora_hf.trainers.heads import TaskHeads

SEEDS = (0, 1, 2)
SIZES = (3, 5, 2)  # classes of the tasks with labels of their own
EBLORA = {"snapshot_fraction": 1.0, "direction_lr": 0.4, "scale_lr": 0.02}


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train(model, seed: int, **options) -> ContinualEBLoRATrainer:
    args = training_arguments(tempfile.mkdtemp(), seed)
    args.learning_rate = 5e-3
    trainer = ContinualEBLoRATrainer(model=copy.deepcopy(model), args=args, compute_metrics=accuracy, **options)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


# ---- labels of the tasks' own ----


def chosen(split: Digits, classes: list[int]) -> DigitsDataset:
    """The digits of some classes, rotated by 90°, with labels counted from zero."""
    kept = torch.isin(split.labels, torch.tensor(classes))
    labels = torch.tensor([classes.index(int(label)) for label in split.labels[kept]])
    return DigitsDataset(torch.rot90(split.images[kept], 1, (2, 3)), labels)


def heads() -> None:
    variants = {"per-task": "per-task", "grow": "grow", "grow, learnt among all labels": "grow"}
    found: dict[str, list[list[float]]] = {name: [] for name in variants}
    for seed in SEEDS:
        splits = load_digits(seed)
        model = pretrain(seed, splits["train"])
        order = torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()
        groups = [order[sum(SIZES[:i]) : sum(SIZES[: i + 1])] for i in range(len(SIZES))]
        tasks = TaskSequence(
            [
                Task(
                    f"t{i}",
                    chosen(splits["train"], group),
                    chosen(splits["test"], group),
                    labels=list(map(str, group)),
                )
                for i, group in enumerate(groups)
            ]
        )
        for name, mode in variants.items():
            among_all = mock.patch.object(TaskHeads, "learning", contextlib.nullcontext)
            with among_all if "all" in name else contextlib.nullcontext():
                options = {"eblora_config": EBLoRAConfig(heads=mode), "train_dataset": tasks}
                trainer = train(model, seed, peft_config=LoraConfig(r=8, target_modules="all-linear"), **options)
            matrix = 100 * trainer.accuracy_matrix
            found[name].append([matrix[-1].mean(), np.diagonal(matrix).mean()])
    for name, rows in found.items():
        final, learnt = np.mean(rows, axis=0)
        print(f"{name}: {final:.1f} over all tasks at the end, {learnt:.1f} just after learning")


# ---- a plain LoRA as the first task ----


def adoption() -> None:
    found: dict[str, list[list[float]]] = {name: [] for name in ("its data", "the adapter alone", "nothing")}
    first, *others = PROTOCOL_TASKS
    for seed in SEEDS:
        splits = load_digits(seed)
        model = pretrain(seed, splits["train"])
        sets = {name: splits["train"].transformed(transformation(name)) for name in PROTOCOL_TASKS}
        tests = {name: splits["test"].transformed(transformation(name)) for name in PROTOCOL_TASKS}
        folder = tempfile.mkdtemp()
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=["classifier"])
        plain = get_peft_model(copy.deepcopy(model), config)
        args = training_arguments(folder, seed)
        args.learning_rate = 3e-3
        trainer = Trainer(model=plain, args=args, train_dataset=sets[first], compute_metrics=accuracy)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        before = trainer.evaluate(tests[first])["eval_accuracy"]
        plain.save_pretrained(folder)
        for name, rows in found.items():
            unprotected = mock.patch.object(BeginningMixin, "_basis_of", return_value={})
            with unprotected if name == "nothing" else contextlib.nullcontext():
                row = train(
                    model,
                    seed,
                    sequence=folder,
                    train_dataset={task: sets[task] for task in others},
                    eval_dataset=tests,
                    eblora_config=EBLoRAConfig(**EBLORA),
                    protect_data=sets[first] if name == "its data" else None,
                ).begun.sequence.tasks[-1].metrics  # fmt: skip
            rows.append([100 * before, 100 * row[first], 100 * float(np.mean([row[task] for task in others]))])
    for name, rows in found.items():
        learnt, left, rest = np.mean(rows, axis=0)
        print(f"protected by {name}: {left:.1f} of {learnt:.1f} is left, {rest:.1f} on the other tasks")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["heads", "adoption"])
    with steady_cpu():
        {"heads": heads, "adoption": adoption}[parser.parse_args().what]()
