"""The index of a published sequence: what it says, and what of it is believed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from .schema import (
    MAX_INDEX,
    MAX_TASKS,
    BaseModelIdentity,
    Count,
    Digest,
    Label,
    Number,
    RepoId,
    TaskName,
    Text,
    Version,
    checked,
    read_checked,
)

INDEX = "eblora_sequence.json"
FORMAT_VERSION = 1
Heads = Literal["shared", "per-task", "grow"]
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
        labels (`list[str]`, *optional*): Names of its labels, by their numbers in its data.
        root_metrics (`dict[str, float]`, *optional*): The row of `metrics` with the head that the root carries after
            this task, where earlier tasks were measured with one of their own.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    name: TaskName
    folder: Text
    created: Text
    rank: Count
    steps: Count
    metrics: Annotated[dict[str, Number], Field(max_length=10_000)] = field(default_factory=dict)
    files: dict[Text, Digest] = field(default_factory=dict)
    labels: Annotated[list[Label], Field(min_length=1, max_length=100_000)] | None = None
    root_metrics: Annotated[dict[str, Number], Field(max_length=10_000)] | None = None

    @property
    def has_basis(self) -> bool:
        """Whether it was learnt by a method that keeps a basis."""
        return f"{self.folder}/{SUBSPACE}" in self.files


@dataclass
class Index:
    """
    The content of `eblora_sequence.json`.

    Args:
        format_version (`int`): Of the files.
        base_model (`dict`): See [`describe_base_model`].
        bases (`str`): `"included"`, `"withheld"` or the repository that holds them.
        files (`dict[str, str]`): sha256 of the files in the root.
        tasks (`list[TaskRecord]`): In the order in which they were learnt.
        heads (`str`, defaults to `"shared"`): As in [`EBLoRAConfig`]: whether tasks have heads of their own size.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    format_version: int
    base_model: BaseModelIdentity
    bases: RepoId
    files: dict[Text, Digest]
    tasks: Annotated[list[TaskRecord], Field(min_length=1, max_length=MAX_TASKS)]
    heads: Heads = "shared"

    def content(self) -> dict[str, Any]:
        """The index as JSON has it; what is not set is left out."""
        tasks = [{key: value for key, value in vars(task).items() if value is not None} for task in self.tasks]
        shared = ["heads"] if self.heads == "shared" else []
        return {key: value for key, value in vars(self).items() if key not in shared} | {"tasks": tasks}

    @classmethod
    def read(cls, path: Path) -> "Index":
        """
        Reads an index and checks it; it may come from anywhere.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if it is not readable, of a newer format, or says what an index cannot say; the message names
                the field.
        """
        return read_checked(path, "index", MAX_INDEX, cls.checked)

    @classmethod
    def checked(cls, data: bytes) -> "Index":
        """
        The index that these bytes are.

        Raises:
            ValueError: naming the field that is wrong.
        """
        version = checked(Version, data)["format_version"]
        if version > FORMAT_VERSION:
            raise ValueError(f"format version {version} is newer than {FORMAT_VERSION}; update eblora_hf")
        index: Index = checked(cls, data)
        if set(index.files) != {ADAPTER, ADAPTER_CONFIG}:
            raise ValueError(f"files: {sorted(index.files)}, expected {ADAPTER} and {ADAPTER_CONFIG}")
        for position, task in enumerate(index.tasks):
            _check_paths(task, position)
            if index.heads != "shared" and not task.labels:
                raise ValueError(f"tasks.{position}.labels: missing, but every task has a head of its own")
        if index.heads != "shared" and not index.base_model.get("label_layer"):
            raise ValueError("base_model.label_layer: missing, but tasks have heads of their own size")
        if len({task.name.lower() for task in index.tasks}) < len(index.tasks):
            raise ValueError("tasks: two have one name, or names that differ in case only")
        return index


def root_rows(tasks: list[TaskRecord], heads: Heads) -> list[dict[str, float]]:
    """
    Rows of the accuracy matrix with the head that the root carries after each task, which is what plain PEFT loads.
    """
    rows = [task.metrics if task.root_metrics is None else task.root_metrics for task in tasks]
    if heads == "per-task":  # the root has no head for an earlier task
        names = [task.name for task in tasks]
        rows = [
            {key: value for key, value in row.items() if key == name or key not in names}
            for name, row in zip(names, rows, strict=True)
        ]
    return rows


def _check_paths(task: TaskRecord, position: int) -> None:
    """Raises a `ValueError` if a task's files lie elsewhere than `append` puts them."""
    folder = f"tasks/{position:02d}-{task.name}"
    if task.folder != folder:
        raise ValueError(f"tasks.{position}.folder: {task.name!r} lies in {task.folder!r} instead of {folder!r}")
    needed = {f"{folder}/{file}" for file in (ADAPTER, ADAPTER_CONFIG, TRAINING)}
    if not needed <= set(task.files) <= needed | {f"{folder}/{SUBSPACE}"}:
        raise ValueError(f"tasks.{position}.files: lists the files {sorted(task.files)}, expected {sorted(needed)}")
