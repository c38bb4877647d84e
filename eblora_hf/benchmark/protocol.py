"""The protocol of the embedded benchmark: one method on one seed, through the real trainer."""

import contextlib
import copy
import dataclasses
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from ..adapters.spectra import mean_sigma_ratio
from ..config import EBLoRAConfig
from ..metrics import continual_metrics
from ..trainers.trainer import ContinualEBLoRATrainer
from .digits import Digits
from .transformations import PROTOCOL_TASKS, transformation

STEPS_PER_TASK = 60
RANK = 4
ANCHOR_ROWS = 90  # of the pre-training, without labels
BASE = "upright digits"  # name of the set that shows how much of the pre-training survives; no task can have it

# per method the grid it is tuned on, as many settings for each, and what that gave; a variant names its `method`
TUNING: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("tuning.json").read_text("utf-8"))
METHODS = ("frozen", *TUNING)


@dataclass
class MethodResult:
    """
    What one method reached on one seed; accuracies and metrics in percent, NaN where a metric has no meaning.

    Args:
        MFN, MAA, BWT, LA, FWT (`float`): See `eblora_hf.metrics`.
        base (`float`): Accuracy on upright digits at the end.
        accuracy_matrix (`list[list[float]]`): R[t][i], accuracy on task i after learning task t; a single row for
            joint training, which learns all tasks at once.
        sigma_ratio (`list[float]`): Mean σ_i/σ_1 of the trained updates; empty for the frozen model.
    """

    MFN: float
    MAA: float
    BWT: float
    LA: float
    FWT: float
    base: float
    accuracy_matrix: list[list[float]]
    sigma_ratio: list[float]


class _StepProgress(TrainerCallback):
    def __init__(self, advance: Callable[[], None]):
        self.advance = advance

    def on_step_end(self, *args, **kwargs) -> None:
        self.advance()


def run_method(
    method: str,
    base_model: nn.Module,
    splits: dict[str, Digits],
    seed: int,
    *,
    settings: dict[str, Any] | None = None,
    tasks: Sequence[str] = PROTOCOL_TASKS,
    rank: int = RANK,
    measured_on: str = "test",
    advance: Callable[[], None] = lambda: None,
) -> MethodResult:
    """
    Learns the tasks with a method and measures it.

    Args:
        method (`str`): One of `METHODS`.
        base_model (`nn.Module`): The pre-trained model, which is left as it is.
        splits (`dict[str, Digits]`): From [`load_digits`].
        seed (`int`): Seed of the training.
        settings (`dict`, *optional*): `learning_rate` and options of [`EBLoRAConfig`] instead of the tuned ones; and
            `anchor`, `"random"` or `"rows"`: 90 of those that the model was pre-trained on.
        tasks (`Sequence[str]`): Names of transformations, in the order they are learnt.
        rank (`int`): LoRA rank of each task.
        measured_on (`str`): The split to measure on: `"test"`, or `"validation"` while tuning.
        advance (`Callable`): Called after each of the training steps.

    Returns:
        [`MethodResult`].
    """
    transforms = {name: transformation(name) for name in tasks}
    train_sets = {name: splits["train"].transformed(transform) for name, transform in transforms.items()}
    test_sets = {name: splits[measured_on].transformed(transform) for name, transform in transforms.items()}
    test_sets[BASE] = splits[measured_on].transformed(lambda images: images)
    model = copy.deepcopy(base_model)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        args = training_arguments(folder, seed)
        if method == "frozen":
            return _frozen(model, args, test_sets)
        settings = dict(TUNING[method]["tuned"] if settings is None else settings)
        args = dataclasses.replace(args, learning_rate=settings.pop("learning_rate"))
        if method == "joint":
            args = dataclasses.replace(args, max_steps=args.max_steps * len(tasks))
            return _joint(model, args, train_sets, test_sets, rank=rank * len(tasks), advance=advance)
        anchor = settings.pop("anchor", None)
        if anchor == "rows":
            anchor = Subset(splits["train"].transformed(lambda images: images), range(ANCHOR_ROWS))
        config = EBLoRAConfig(method=TUNING[method].get("method", method), **settings)
        return _continual(model, args, train_sets, test_sets, config=config, rank=rank, anchor=anchor, advance=advance)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the context transformers says no more than errors, and nothing of what peft still asks it for."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)


def training_arguments(folder: str, seed: int) -> TrainingArguments:
    """The arguments of one task's training, but for the learning rate."""
    return TrainingArguments(
        output_dir=folder,
        seed=seed,
        max_steps=STEPS_PER_TASK,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=537,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )


def train(
    model: nn.Module,
    args: TrainingArguments,
    train_sets: dict[str, Dataset],
    test_sets: dict[str, Dataset] | None = None,
    *,
    config: EBLoRAConfig,
    rank: int = RANK,
    anchor: Dataset | str | None = None,
    advance: Callable[[], None] = lambda: None,
) -> ContinualEBLoRATrainer:
    """
    Trains a model on tasks, as the protocol adapts it.

    Args:
        model (`nn.Module`): The pre-trained model; it gets an adapter.
        args (`TrainingArguments`): From [`training_arguments`].
        train_sets (`dict[str, Dataset]`): By task name.
        test_sets (`dict[str, Dataset]`, *optional*): What to measure after each task; it has every task.
        config ([`EBLoRAConfig`]): Method and options.
        rank (`int`): LoRA rank of each task.
        anchor (`Dataset` or `"random"`, *optional*): As in [`ContinualMixin`].
        advance (`Callable`): Called after each of the training steps.

    Returns:
        [`ContinualEBLoRATrainer`]: After training; the sequence is in `args.output_dir`.
    """
    trainer = ContinualEBLoRATrainer(
        model=model,
        args=args,
        peft_config=LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", exclude_modules=["classifier"]),
        eblora_config=config,
        train_dataset=train_sets,
        eval_dataset=test_sets,
        compute_metrics=_accuracy,
        callbacks=[_StepProgress(advance)],
        anchor=anchor,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def _continual(model, args, train_sets, test_sets, *, config, rank, anchor, advance) -> MethodResult:
    trainer = train(model, args, train_sets, test_sets, config=config, rank=rank, anchor=anchor, advance=advance)
    published = trainer.begun.sequence
    base = published.tasks[-1].metrics[BASE]
    return _result(trainer.accuracy_matrix, base, mean_sigma_ratio(published.adapters())[:rank])


def _joint(model, args, train_sets, test_sets, *, rank, advance) -> MethodResult:
    """One LoRA of the rank of all tasks together, on the data of all tasks together: the upper bound."""
    together: dict[str, Dataset] = {"joint": ConcatDataset(train_sets.values())}
    measured_sets = test_sets | {"joint": test_sets[BASE]}  # every task of a sequence has an evaluation set
    config = EBLoRAConfig(method="lora")
    trainer = train(model, args, together, measured_sets, config=config, rank=rank, advance=advance)
    published = trainer.begun.sequence
    measured = published.tasks[-1].metrics
    row = [100.0 * measured[name] for name in train_sets]
    return MethodResult(
        MFN=float(np.mean(row)),
        **dict.fromkeys(("MAA", "BWT", "LA", "FWT"), float("nan")),
        base=100.0 * measured[BASE],
        accuracy_matrix=[row],
        sigma_ratio=mean_sigma_ratio(published.adapters())[:rank],
    )


def _frozen(model, args, test_sets) -> MethodResult:
    trainer = Trainer(model=model, args=args, compute_metrics=_accuracy)
    trainer.remove_callback(PrinterCallback)
    measured = {name: trainer.evaluate(dataset)["eval_accuracy"] for name, dataset in test_sets.items()}
    base = measured.pop(BASE)
    return _result(np.array([list(measured.values())] * len(measured)), base, [])


def _result(matrix: np.ndarray, base: float, sigma_ratio: list[float]) -> MethodResult:
    values = continual_metrics(100.0 * matrix)
    del values["transfer"]
    return MethodResult(
        **values, base=100.0 * base, accuracy_matrix=(100.0 * matrix).tolist(), sigma_ratio=sigma_ratio
    )


def _accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
