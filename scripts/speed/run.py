"""Whole runs: two tasks by the stock Trainer with LoRA and by ours, with the phases of ours."""

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from eblora_hf import ContinualEBLoRATrainer
from eblora_hf.memory.moments import Moments
from eblora_hf.methods.eblora import EBLoRA
from eblora_hf.published.sequence import PublishedSequence

from .models import make_bert, make_llama

PHASES = (
    "start_snapshot",
    "training",
    "observation",
    "end_snapshot",
    "decomposition",
    "append",
    "evaluation",
)
_CLASSES = 8
_BATCH_TOKENS = 1024


def measure_run(
    name: str, size: str, kind: str, epochs: int, tokens: int, rows: int, repeat: int, device: torch.device
) -> dict[str, Any]:
    """
    Processor and wall time of two tasks, ours over stock LoRA: medians of interleaved repetitions.

    Args:
        name (`str`): What the set is called.
        size (`str`): Of the model.
        kind (`str`): `"decoder"`, which learns the next token, or `"encoder"`, which learns a class.
        epochs (`int`), tokens (`int`), rows (`int`): Length of a task, of its rows, and how many it has.
        repeat (`int`): Repetitions of each.
        device (`torch.device`): Where it runs.
    """
    make = {"decoder": make_llama, "encoder": functools.partial(make_bert, classes=_CLASSES)}[kind]
    data = {task: _rows(kind, rows, tokens, seed) for seed, task in enumerate(("first", "second"))}
    arguments = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": max(_BATCH_TOKENS // tokens, 1),
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
        "bf16": device.type == "cuda",
    }
    spent: dict[str, list[tuple[float, float]]] = {"lora": [], "ours": []}
    phases: list[dict[str, float]] = []
    for contender in ["lora", "ours"] * repeat:
        model = make(size, device)
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(folder, **arguments)
            before = time.process_time(), time.perf_counter()
            if contender == "lora":
                _run_lora(model, args, data)
            else:
                phases.append(_run_ours(model, args, data))
            spent[contender].append((time.process_time() - before[0], time.perf_counter() - before[1]))
    seconds = {key: [statistics.median(column) for column in zip(*value, strict=True)] for key, value in spent.items()}
    row = {"what": "run", "set": name, "kind": kind, "epochs": epochs, "tokens": tokens, "rows": rows}
    row |= {"lora_s": seconds["lora"][0], "ours_s": seconds["ours"][0]}
    row |= {"run_over_lora": seconds["ours"][0] / seconds["lora"][0]}
    row |= {"wall_over_lora": seconds["ours"][1] / seconds["lora"][1]}
    return row | {f"{phase}_s": statistics.median(run[phase] for run in phases) for phase in PHASES}


def _rows(kind: str, count: int, tokens: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 8192, (count, tokens), generator=generator).tolist()
    classes = torch.randint(0, _CLASSES, (count,), generator=generator).tolist()
    return [
        {"input_ids": row, "attention_mask": [1] * tokens, "labels": row if kind == "decoder" else label}
        for row, label in zip(ids, classes, strict=True)
    ]


def _run_lora(model: torch.nn.Module, args: TrainingArguments, data: dict[str, list]) -> None:
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    for rows in data.values():
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.train()
        trainer.save_model()


def _run_ours(model: torch.nn.Module, args: TrainingArguments, data: dict[str, list]) -> dict[str, float]:
    """Runs both tasks; processor seconds of each phase, of which training is what the others leave."""
    phases = Phases()
    trainer = ContinualEBLoRATrainer(
        model, args, train_dataset=data, peft_config=LoraConfig(r=16, target_modules="all-linear")
    )
    with contextlib.ExitStack() as timers:
        for phase, owner, name in (
            ("start_snapshot", ContinualEBLoRATrainer, "snapshot_of_start"),
            ("observation", Moments, "add"),
            ("end_snapshot", ContinualEBLoRATrainer, "snapshot"),
            ("decomposition", EBLoRA, "begin_task"),
            ("decomposition", EBLoRA, "end_task"),
            ("append", PublishedSequence, "append"),
            ("evaluation", ContinualEBLoRATrainer, "measure"),
            ("training", ContinualEBLoRATrainer, "train"),
        ):
            timers.enter_context(phases.timed(phase, owner, name))
        trainer.train()
    return phases.seconds


class Phases:
    """Processor time by phase; one within another counts for the inner, but for what a snapshot consists of."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._running: list[str] = []
        self._since = 0.0

    def _switch(self) -> None:
        now = time.process_time()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def timed(self, phase: str, owner: type, name: str) -> Iterator[None]:
        """Within the context the time of a method counts for a phase."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*arguments: Any, **options: Any) -> Any:
            self._switch()
            within_snapshot = self._running and self._running[-1].endswith("_snapshot")
            self._running.append(self._running[-1] if within_snapshot else phase)
            try:
                return method(*arguments, **options)
            finally:
                self._switch()
                self._running.pop()

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, method)
