"""The index of a published sequence: what it says, and what of it is believed."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Task

INDEX = "eblora_sequence.json"
FORMAT_VERSION = 1
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SUBSPACE, TRAINING = "subspace.safetensors", "training.json"


@dataclass
class TaskRecord:
    """
    What the index says of one task.

    Args:
        name (`str`): Its name.
        folder (`str`): Its folder, relative to the sequence. The adapter in it is the base plus this task's update
            alone, not the model after the task.
        created (`str`): When it was added, ISO 8601 in UTC.
        rank (`int`): LoRA rank of its update.
        steps (`int`): Optimizer steps it was trained for.
        metrics (`dict[str, float]`): Row of the accuracy matrix: accuracy on each task after learning this one.
        files (`dict[str, str]`): sha256 of each file, by its path relative to the sequence.
    """

    name: str
    folder: str
    created: str
    rank: int
    steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def check(self, position: int) -> None:
        """Raises a `ValueError` if a name or path in it is not what `append` writes at that position."""
        Task(self.name, train_dataset=())  # the name is safe
        for field_name in ("rank", "steps"):
            value = getattr(self, field_name)
            if type(value) is not int or value < 0:
                raise ValueError(f"task {self.name!r} has {field_name}={value!r}, expected a whole number")
        if not isinstance(self.created, str) or not isinstance(self.metrics, dict) or not isinstance(self.files, dict):
            raise ValueError(f"task {self.name!r}: expected text in 'created', and 'metrics' and 'files' by name")
        for key, value in self.metrics.items():
            if not isinstance(key, str) or type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"task {self.name!r} has the metric {key!r}: {value!r}, expected a finite number")
        if self.folder != f"tasks/{position:02d}-{self.name}":
            raise ValueError(
                f"task {self.name!r} lies in {self.folder!r} instead of 'tasks/{position:02d}-{self.name}'"
            )
        needed = {f"{self.folder}/{file}" for file in (ADAPTER, ADAPTER_CONFIG, TRAINING)}
        if not needed <= set(self.files) <= needed | {f"{self.folder}/{SUBSPACE}"}:
            raise ValueError(f"task {self.name!r} lists the files {sorted(self.files)}, expected {sorted(needed)}")


def check_tasks(tasks: list[TaskRecord]) -> None:
    """Raises a `ValueError` for tasks that an index cannot have: what is written is checked by what reads it."""
    for position, task in enumerate(tasks):
        task.check(position)
    if len({task.name.lower() for task in tasks}) < len(tasks):
        raise ValueError("two tasks have one name, or names that differ in case only")


@dataclass
class Index:
    """The content of `eblora_sequence.json`."""

    base_model: dict[str, Any]
    bases: str
    files: dict[str, str]
    tasks: list[TaskRecord]

    @classmethod
    def read(cls, path: Path) -> "Index":
        """
        Reads an index and checks it; it may come from anywhere.

        Raises:
            ValueError: if it is not readable, of a newer format, or names files it should not.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["format_version"]
            if type(version) is not int or version < 1:
                raise ValueError(f"format version {version!r} is none")
            if version > FORMAT_VERSION:
                raise ValueError(f"format version {version} is newer than {FORMAT_VERSION}; update eblora_hf")
            tasks = [TaskRecord(**task) for task in content["tasks"]]
            check_tasks(tasks)
            files = {name: content["files"][name] for name in (ADAPTER, ADAPTER_CONFIG)}
            return cls(content["base_model"], content["bases"], files, tasks)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a readable index: {error!s}.") from error
