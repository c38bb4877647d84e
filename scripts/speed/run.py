"""Whole runs: two tasks by the stock Trainer with LoRA and by ours, with the phases of ours."""

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from eblora_hf import ContinualEBLoRATrainer
from eblora_hf.methods.eblora import EBLoRA
from eblora_hf.published.sequence import PublishedSequence

from .models import make_bert, make_llama

SIZES = {"tiny": "small", "vit": "97m", "1b": "97m", "7b": "97m"}  # of the models that stand for a layer set
_CLASSES = 8
_BATCH_TOKENS = 1024


def measure_run(name: str, kind: str, epochs: int, tokens: int, rows: int, repeat: int, device: torch.device) -> dict:
    """
    Processor and wall time of two tasks, ours over stock LoRA: medians of interleaved repetitions.

    Args:
        name (`str`): The layer set.
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
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
        "bf16": device.type == "cuda",
    }
    spent: dict[str, list[tuple[float, float]]] = {"lora": [], "ours": []}
    phases: list[dict[str, float]] = []
    for contender in ["lora", "ours"] * repeat:
        model = make(SIZES[name], device)
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
    return row | {f"{phase}_s": statistics.median(run[phase] for run in phases) for phase in phases[0]}


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
    seconds: dict[str, float] = {}
    trainer = ContinualEBLoRATrainer(
        model, args, train_dataset=data, peft_config=LoraConfig(r=16, target_modules="all-linear")
    )

    def of_snapshot() -> str:
        return "start_snapshot" if trainer.constraint is None else "end_snapshot"

    with contextlib.ExitStack() as timers:
        for phase, owner, name in (
            ("start_snapshot", ContinualEBLoRATrainer, "snapshot"),
            ("decomposition", EBLoRA, "begin_task"),
            ("decomposition", EBLoRA, "end_task"),
            ("append", PublishedSequence, "append"),
            ("evaluation", ContinualEBLoRATrainer, "measure"),
        ):
            timers.enter_context(_timed(seconds, of_snapshot if name == "snapshot" else phase, owner, name))
        before = time.process_time()
        trainer.train()
        whole = time.process_time() - before
    return {"training": whole - sum(seconds.values())} | seconds


@contextlib.contextmanager
def _timed(seconds: dict[str, float], phase: str | Callable[[], str], owner: type, name: str) -> Iterator[None]:
    """Within the context the processor time of a method is added to that of a phase."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def timed(*arguments: Any, **options: Any) -> Any:
        which = phase if isinstance(phase, str) else phase()
        before = time.process_time()
        try:
            return method(*arguments, **options)
        finally:
            seconds[which] = seconds.get(which, 0.0) + time.process_time() - before

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, method)
