"""What a suite of the benchmark is: a pre-trained model, tasks in an order, and what is left of the pre-training."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from ..published.index import Heads

ANCHOR_ROWS = 90  # like those of the pre-training, without labels


@dataclass(frozen=True)
class Problem:
    """
    What methods are given on one seed.

    Args:
        model (`nn.Module`): The pre-trained model, with a head.
        train_sets, test_sets (`dict[str, Dataset]`): By task, in the order of the tasks.
        anchor (`Dataset`): `ANCHOR_ROWS` rows like those of the pre-training.
        left (`Callable`): Measures a model: `base`, the accuracy in percent on what the pre-training taught, and where
            the suite has it `similarity`, see [`TextSuite`].
        trainer_arguments (`dict`): Of the trainer, beside those of every suite.
    """

    model: nn.Module
    train_sets: dict[str, Dataset]
    test_sets: dict[str, Dataset]
    anchor: Dataset
    left: Callable[[nn.Module], dict[str, float]]
    trainer_arguments: dict[str, Any]


class Suite(ABC):
    """
    Methods are compared on it.

    Args:
        name (`str`): As in `--suite`.
        tasks (`Sequence[str]`): Names of its tasks, in the order they are learnt.
        heads (`str`): As in [`EBLoRAConfig`].
        about (`str`): One sentence.

    Attributes:
        tuning (`dict[str, dict]`): By method the grid it is tuned on, as many settings for each, and what that gave; a
            variant names its `method`.
        tuning_seeds (`tuple[int]`): On whose validation splits.
        rank (`int`): LoRA rank of each task.
        batch_size (`int`): Rows a step.
    """

    settings_of: str  # whose settings the methods have: `settings/<name>.json`
    tuning_seeds: tuple[int, ...]
    rank: int
    batch_size: int

    def __init__(self, name: str, tasks: Sequence[str], heads: Heads, about: str):
        self.name, self.tasks, self.heads, self.about = name, tuple(tasks), heads, about
        path = Path(__file__).parent / "settings" / f"{self.settings_of}.json"
        self.tuning: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))

    @property
    def methods(self) -> tuple[str, ...]:
        return ("frozen", *self.tuning)

    @abstractmethod
    def check_task(self, name: str) -> None:
        """
        Raises:
            ValueError: if there is no such task, saying which there are.
        """

    @abstractmethod
    def prepare(self, seed: int, folder: Path) -> None:
        """Makes in `folder` what the runs of a seed share, unless it is there."""

    @abstractmethod
    def problem(self, seed: int, folder: Path, tasks: Sequence[str], measured_on: str) -> Problem:
        """
        What methods are given on a seed.

        Args:
            seed (`int`): Seed of data split and base model.
            folder (`Path`): As in `prepare`.
            tasks (`Sequence[str]`): Names of tasks.
            measured_on (`str`): The split to measure on: `"test"`, or `"validation"` while tuning.
        """
