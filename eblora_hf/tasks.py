"""The sequence of tasks that a run learns, and what a task has of its own."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .config import check_rate

_LABEL_LENGTH = 200  # characters
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclasses.dataclass
class Task:
    """
    One task of a sequence. What is `None` comes from the arguments of the trainer.

    Args:
        name (`str`): Letters, digits, `.`, `_` and `-`; it becomes the name of a folder.
        train_dataset: The training set, with a length.
        eval_dataset (*optional*): The evaluation set of the task.
        labels (`list[str]`, *optional*): Names of its labels, by their numbers in the data. By default those of the
            `ClassLabel` in a column `label` or `labels`, if there is one.
        num_train_epochs (`float`, *optional*), max_steps (`int`, *optional*), learning_rate (`float`, *optional*):
            Instead of those in `TrainingArguments`. Setting the epochs lifts `max_steps` of the arguments for this
            task.
        direction_lr (`float` or `"auto"`, *optional*), scale_lr (`float` or `"auto"`, *optional*),
        head_learning_rate (`float`, *optional*): Instead of those in [`EBLoRAConfig`].
    """

    name: str
    train_dataset: Any
    eval_dataset: Any = None
    num_train_epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    direction_lr: float | str | None = None
    scale_lr: float | str | None = None
    labels: list[str] | None = None
    head_learning_rate: float | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not _TASK_NAME.fullmatch(self.name) or self.name.endswith("."):
            raise ValueError(
                f"The task name {self.name!r} is not a safe folder name: use up to 64 letters, digits, '.', '_' and "
                "'-', starting with a letter or digit."
            )
        if self.train_dataset is None:
            raise ValueError(f"The task {self.name!r} has no training set.")
        if self.num_train_epochs is not None and self.max_steps is not None:
            raise ValueError(f"The task {self.name!r} sets both num_train_epochs and max_steps; set one.")
        for name in ("num_train_epochs", "max_steps", "learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"The task {self.name!r} sets {name}={value!r}: expected a positive number.")
        for name in ("direction_lr", "scale_lr"):
            if getattr(self, name) is not None:
                setattr(self, name, check_rate(name, getattr(self, name)))
        if self.labels is not None:
            names = list(self.labels) if isinstance(self.labels, list | tuple) else []
            plain = all(isinstance(label, str) and 0 < len(label) <= _LABEL_LENGTH for label in names)
            if not plain or not names or len(set(names)) < len(names):
                raise ValueError(
                    f"The task {self.name!r} has labels={self.labels!r:.200}: expected a list of different names, "
                    f"each of 1 to {_LABEL_LENGTH} characters."
                )
            self.labels = names


class TaskSequence:
    """
    Tasks in the order they are learnt.

    Args:
        tasks (`list[Task]` or `dict[str, dataset]`): Tasks, or training sets by task name.

    Raises:
        ValueError: if there is none, or two have the same name.
    """

    def __init__(self, tasks: list[Task] | Mapping[str, Any]):
        if isinstance(tasks, Mapping):
            tasks = [Task(name, dataset) for name, dataset in tasks.items()]
        self.tasks = list(tasks)
        for task in self.tasks:
            if not isinstance(task, Task):
                raise TypeError(f"A TaskSequence is made of Task objects, got {type(task).__name__}.")
        if not self.tasks:
            raise ValueError("A sequence needs at least one task, got none.")
        seen = set()
        for name in self.names:
            if name.lower() in seen:  # folders on some file systems ignore case
                raise ValueError(f"Two tasks are named {name!r}; every task needs a name of its own.")
            seen.add(name.lower())

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)
