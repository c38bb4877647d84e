"""The protocol of the embedded benchmark: one method on one seed of a suite, through the real trainer."""

import contextlib
import copy
import dataclasses
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig
from torch import nn
from torch.utils.data import ConcatDataset, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from ..adapters.spectra import mean_sigma_ratio
from ..config import EBLoRAConfig
from ..metrics import continual_metrics
from ..published.sequence import PublishedSequence
from ..trainers.labels import set_labels
from ..trainers.trainer import ContinualEBLoRATrainer
from .suite import Problem, Suite

STEPS_PER_TASK = 60
NOT_MEASURED = float("nan")


@dataclass
class MethodResult:
    """
    What one method reached on one seed; accuracies and metrics in percent, NaN where a metric has no meaning.

    Args:
        MFN, MAA, BWT, LA, FWT (`float`): See `eblora_hf.metrics`.
        base (`float`): Accuracy at the end on what the pre-training taught.
        accuracy_matrix (`list[list[float]]`): R[t][i], accuracy on task i after learning task t; a single row for
            joint training, which learns all tasks at once.
        sigma_ratio (`list[float]`): Mean σ_i/σ_1 of the trained updates; empty for the frozen model.
        similarity (`float`): Of a text encoder at the end with itself before, see [`HeldOut`].
        room (`float`): Share of a layer's input directions that no basis takes, mean over the layers, in percent.
        megabytes (`float`): Of the sequence on disk.
        seconds (`float`): Processor time of training and of the evaluations after each task.
    """

    MFN: float
    MAA: float
    BWT: float
    LA: float
    FWT: float
    base: float
    accuracy_matrix: list[list[float]]
    sigma_ratio: list[float]
    similarity: float = NOT_MEASURED
    room: float = NOT_MEASURED
    megabytes: float = NOT_MEASURED
    seconds: float = field(default=NOT_MEASURED, compare=False)


class _StepProgress(TrainerCallback):
    def __init__(self, advance: Callable[[], None]):
        self.advance = advance

    def on_step_end(self, *args, **kwargs) -> None:
        self.advance()


def run_method(
    method: str,
    suite: Suite,
    problem: Problem,
    seed: int,
    *,
    settings: dict[str, Any] | None = None,
    rank: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> MethodResult:
    """
    Learns the tasks with a method and measures it.

    Args:
        method (`str`): One of the suite's.
        suite ([`Suite`]): It has the settings.
        problem ([`Problem`]): Of the seed; its model is left as it is.
        seed (`int`): Seed of the training.
        settings (`dict`, *optional*): `learning_rate` and options of [`EBLoRAConfig`] instead of the tuned ones; and
            `anchor`, `"random"` or `"rows"`: those of the problem.
        rank (`int`, *optional*): LoRA rank of each task instead of the suite's.
        advance (`Callable`): Called after each of the training steps.

    Returns:
        [`MethodResult`].
    """
    rank = rank or suite.rank
    model = copy.deepcopy(problem.model)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        args = training_arguments(folder, seed, suite.batch_size)
        if method == "frozen":
            return _frozen(model, args, problem, suite.heads)
        settings = dict(suite.tuning[method]["tuned"] if settings is None else settings)
        args = dataclasses.replace(args, learning_rate=settings.pop("learning_rate"))
        options = problem.trainer_arguments | {"advance": advance}
        begun = time.process_time()
        if method == "joint":
            return _joint(model, args, problem, rank=rank * len(problem.train_sets), begun=begun, options=options)
        anchor = settings.pop("anchor", None)
        config = EBLoRAConfig(method=suite.tuning[method].get("method", method), heads=suite.heads, **settings)
        trainer = train(
            model,
            args,
            problem.train_sets,
            problem.test_sets,
            config=config,
            rank=rank,
            anchor=problem.anchor if anchor == "rows" else anchor,
            **options,
        )
        seconds = time.process_time() - begun
        # a head that grows is asked without being told the task
        matrix = trainer.root_accuracy_matrix if suite.heads == "grow" else trainer.accuracy_matrix
        published = trainer.begun.sequence
        result = _result(matrix, problem.left(trainer.model), mean_sigma_ratio(published.adapters())[:rank])
        return dataclasses.replace(
            result, room=_room(published), megabytes=_megabytes(published.folder), seconds=seconds
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the context transformers shows no bars and says no more than errors, nothing of what peft asks it for."""
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def training_arguments(folder: str, seed: int, batch_size: int = 32) -> TrainingArguments:
    """The arguments of one task's training, but for the learning rate."""
    return TrainingArguments(
        output_dir=folder,
        seed=seed,
        max_steps=STEPS_PER_TASK,
        per_device_train_batch_size=batch_size,
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
    rank: int,
    anchor: Dataset | str | None = None,
    advance: Callable[[], None] = lambda: None,
    **trainer_arguments: Any,
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
        trainer_arguments: More arguments of the trainer.

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
        **trainer_arguments,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def _joint(model, args, problem: Problem, *, rank, begun, options) -> MethodResult:
    """One LoRA of the rank of all tasks together, on the data of all tasks together: the upper bound."""
    args = dataclasses.replace(args, max_steps=args.max_steps * len(problem.train_sets))
    together: dict[str, Dataset] = {"joint": ConcatDataset(problem.train_sets.values())}
    first = next(iter(problem.test_sets.values()))
    measured_sets = problem.test_sets | {"joint": first}  # every task of a sequence has an evaluation set
    trainer = train(model, args, together, measured_sets, config=EBLoRAConfig(method="lora"), rank=rank, **options)
    seconds = time.process_time() - begun
    published = trainer.begun.sequence
    row = [100.0 * published.tasks[-1].metrics[name] for name in problem.train_sets]
    return MethodResult(
        MFN=float(np.mean(row)),
        **dict.fromkeys(("MAA", "BWT", "LA", "FWT"), NOT_MEASURED),
        **problem.left(trainer.model),
        accuracy_matrix=[row],
        sigma_ratio=mean_sigma_ratio(published.adapters())[:rank],
        room=_room(published),
        megabytes=_megabytes(published.folder),
        seconds=seconds,
    )


def _frozen(model, args, problem: Problem, heads: str) -> MethodResult:
    """The pre-trained model; where tasks have heads of their own, these alone are trained."""
    begun = time.process_time()
    if heads == "shared":
        row = [
            _stock_trainer(model, args, problem).evaluate(own)["eval_accuracy"] for own in problem.test_sets.values()
        ]
        matrix = np.array([row] * len(row))
    else:
        row = [_head_alone(model, args, problem, name) for name in problem.train_sets]
        matrix = np.where(np.tri(len(row), dtype=bool), row, NOT_MEASURED)  # no head before its task
    result = _result(matrix, problem.left(model), [])
    return dataclasses.replace(result, seconds=time.process_time() - begun)


def _head_alone(model, args, problem: Problem, name: str) -> float:
    """Accuracy on a task of a head on the frozen model."""
    model, train_set = copy.deepcopy(model).requires_grad_(False), problem.train_sets[name]
    labels: Any = set_labels(train_set)
    set_seed(args.seed)  # of the head
    model.num_labels = model.config.num_labels = len(labels)
    model.classifier = nn.Linear(model.config.hidden_size, model.num_labels)
    trainer = _stock_trainer(model, dataclasses.replace(args, learning_rate=1e-2), problem, train_dataset=train_set)
    trainer.train()
    return trainer.evaluate(problem.test_sets[name])["eval_accuracy"]


def _stock_trainer(model, args, problem: Problem, **sets: Any) -> Trainer:
    trainer = Trainer(model=model, args=args, compute_metrics=_accuracy, **sets, **problem.trainer_arguments)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _result(matrix: np.ndarray, left: dict[str, float], sigma_ratio: list[float]) -> MethodResult:
    values = continual_metrics(100.0 * matrix)
    del values["transfer"]
    return MethodResult(**values, **left, accuracy_matrix=(100.0 * matrix).tolist(), sigma_ratio=sigma_ratio)


def _room(published: PublishedSequence) -> float:
    bases = published.bases().values()
    return 100.0 * float(np.mean([1.0 - basis.shape[1] / basis.shape[0] for basis in bases])) if bases else 100.0


def _megabytes(folder: Path) -> float:
    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts)
    return sum(sizes) / 1e6


def _accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
