"""The protocol of the embedded benchmark: one method on one seed, through the real trainer."""

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from peft import LoraConfig
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from ..analysis.spectra import mean_sigma_ratio
from ..config import EBLoRAConfig
from ..metrics import continual_metrics
from ..trainer import ContinualEBLoRATrainer
from .digits import TASKS, Digits

STEPS_PER_TASK = 60
BASE = "upright"  # name of the set that shows how much of the pre-training survives

# Tuned on validation with seeds 100 and 101; EBLoRA runs on its defaults
SETTINGS: dict[str, dict] = {
    "lora": {"learning_rate": 5.5e-3},
    "ebo": {"learning_rate": 5e-3, "direction_lr": 0.2, "scale_lr": 0.01},
    "eblora": {"learning_rate": 5e-3},
}
METHODS = ("frozen", *SETTINGS)


@dataclass
class MethodResult:
    """
    What one method reached on one seed; accuracies and metrics in percent.

    Args:
        MFN, MAA, BWT, LA, FWT (`float`): See `eblora_hf.metrics`.
        base (`float`): Accuracy on upright digits at the end.
        accuracy_matrix (`list[list[float]]`): R[t][i], accuracy on task i after learning task t.
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
    settings: dict | None = None,
    advance: Callable[[], None] = lambda: None,
) -> MethodResult:
    """
    Learns the six tasks with a method and measures it on the test split.

    Args:
        method (`str`): One of `METHODS`.
        base_model (`nn.Module`): The pre-trained model, which is left as it is.
        splits (`dict[str, Digits]`): From [`load_digits`].
        seed (`int`): Seed of the training.
        settings (`dict`, *optional*): `learning_rate` and options of [`EBLoRAConfig`] instead of the tuned `SETTINGS`.
        advance (`Callable`): Called after each of the training steps.

    Returns:
        [`MethodResult`].
    """
    train = {name: splits["train"].transformed(transform) for name, transform in TASKS.items()}
    test = {name: splits["test"].transformed(transform) for name, transform in TASKS.items()}
    test[BASE] = splits["test"].transformed(lambda images: images)
    model = copy.deepcopy(base_model)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with tempfile.TemporaryDirectory() as folder:
            if method == "frozen":
                return _frozen(model, test, _arguments(folder, seed))
            return _trained(method, settings, model, train, test, _arguments(folder, seed), advance)
    finally:
        logging.set_verbosity(verbosity)


def _arguments(folder: str, seed: int) -> TrainingArguments:
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


def _trained(method, settings, model, train, test, args, advance) -> MethodResult:
    settings = dict(SETTINGS[method] if settings is None else settings)
    args = dataclasses.replace(args, learning_rate=settings.pop("learning_rate"))
    trainer = ContinualEBLoRATrainer(
        model=model,
        args=args,
        peft_config=LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", exclude_modules=["classifier"]),
        eblora_config=EBLoRAConfig(method=method, **settings),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=_accuracy,
        callbacks=[_StepProgress(advance)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    published = trainer.task_callback.sequence
    base = published.tasks[-1].metrics[BASE]
    return _result(trainer.accuracy_matrix, base, mean_sigma_ratio(published.adapters()))


def _frozen(model, test, args) -> MethodResult:
    trainer = Trainer(model=model, args=args, eval_dataset=test, compute_metrics=_accuracy)
    trainer.remove_callback(PrinterCallback)
    measured = trainer.evaluate()
    row = [measured[f"eval_{name}_accuracy"] for name in TASKS]
    return _result(np.array([row] * len(row)), measured[f"eval_{BASE}_accuracy"], [])


def _result(matrix: np.ndarray, base: float, sigma_ratio: list[float]) -> MethodResult:
    values = continual_metrics(100.0 * matrix)
    del values["transfer"]
    return MethodResult(
        **values, base=100.0 * base, accuracy_matrix=(100.0 * matrix).tolist(), sigma_ratio=sigma_ratio
    )


def _accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
