"""The published sequence on disk: an index, one folder per task that is never changed again, and all tasks as one
adapter.

    eblora_sequence.json                              index: format, base model, tasks in order with sha256 of their
    files adapter_config.json, adapter_model.safetensors    all tasks as one stock LoRA (derived from the task folders)
    tasks/00-<name>/adapter_config.json, …            that task's update alone (base + its ΔW), stock LoRA
    tasks/00-<name>/subspace.safetensors              the columns this task added to each layer's basis
    tasks/00-<name>/training.json                     how it was trained

A task folder is written under a temporary name, synced and renamed; the index is replaced last. A crash leaves the old
sequence or the new one.
"""

import datetime
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig
from torch import nn

from .composition import AdapterState, concatenate, folded_config
from .subspace import BasisExtension

INDEX = "eblora_sequence.json"
FORMAT_VERSION = 1
_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_SUBSPACE, _TRAINING = "subspace.safetensors", "training.json"


@dataclass
class TaskRecord:
    """
    What the index says of one task.

    Args:
        name (`str`): Its name.
        folder (`str`): Its folder, relative to the sequence.
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


class PublishedSequence:
    """
    The tasks learnt so far, in a folder.

    Args:
        folder (`str` or `Path`): Where the sequence is, or will be at the first `append`.
        base_model (`dict`): Identity of the base model, see [`describe_base_model`].
        tasks (`list[TaskRecord]`): The tasks already there; use [`PublishedSequence.open`] to read them.
    """

    def __init__(self, folder: str | Path, base_model: dict[str, Any], tasks: list[TaskRecord] | None = None):
        self.folder = Path(folder)
        self.base_model = base_model
        self.tasks = tasks or []

    @staticmethod
    def exists(folder: str | Path) -> bool:
        return (Path(folder) / INDEX).is_file()

    @classmethod
    def open(cls, folder: str | Path) -> "PublishedSequence":
        """
        Reads the index and verifies every file in it.

        Raises:
            FileNotFoundError: if there is no sequence, or a file of it is missing.
            ValueError: if the index is not readable or of a newer format, or a file was changed; the message names it.
        """
        path = Path(folder) / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no sequence: there is no {INDEX} in it.")
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            version = index["format_version"]
            if version > FORMAT_VERSION:
                raise ValueError(f"format version {version} is newer than {FORMAT_VERSION}; update eblora_hf")
            tasks = [TaskRecord(**task) for task in index["tasks"]]
            sequence = cls(folder, index["base_model"], tasks)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a readable index: {error!s}.") from error
        sequence.verify()
        return sequence

    def verify(self) -> None:
        """Checks the sha256 of every task's files. Raises as [`PublishedSequence.open`] does."""
        for task in self.tasks:
            for name, digest in task.files.items():
                path = self.folder / name
                if not path.is_file():
                    raise FileNotFoundError(f"{path} of the task {task.name!r} is missing; restore the sequence.")
                if _sha256(path) != digest:
                    raise ValueError(
                        f"{path} of the task {task.name!r} was changed after it was published (its sha256 differs "
                        "from the index). Restore it from a copy of the sequence."
                    )

    def check_base_model(self, model: nn.Module) -> None:
        """
        Raises if `model` has another architecture than the one the tasks were learnt on.

        Raises:
            ValueError: naming both.
        """
        described = describe_base_model(model)
        if described["fingerprint"] != self.base_model["fingerprint"]:
            raise ValueError(
                f"The sequence in {self.folder} was learnt on {self.base_model['name_or_path']!r} "
                f"({self.base_model['architecture']}), whose weights have other names or shapes than those of "
                f"{described['name_or_path']!r} ({described['architecture']}). Load the base model it was learnt on."
            )

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    def adapters(self) -> list[AdapterState]:
        """The folded adapter of each task."""
        return [safetensors.torch.load_file(self.folder / task.folder / _ADAPTER) for task in self.tasks]

    def bases(self) -> dict[str, torch.Tensor]:
        """Per layer name the basis of all tasks, `(d_in, p)`: the concatenation of what each task added."""
        columns: dict[str, list[torch.Tensor]] = {}
        for task in self.tasks:
            path = self.folder / task.folder / _SUBSPACE
            for key, value in safetensors.torch.load_file(path).items() if path.is_file() else ():
                if key.endswith(".columns"):
                    columns.setdefault(key.removesuffix(".columns"), []).append(value)
        return {name: torch.cat(added, dim=1) for name, added in columns.items()}

    def append(
        self,
        name: str,
        adapter: AdapterState,
        config: LoraConfig,
        extensions: dict[str, BasisExtension],
        *,
        steps: int,
        metrics: dict[str, float],
        training: dict[str, Any],
    ) -> TaskRecord:
        """
        Adds a finished task. Its folder appears under its name only when complete, and counts only once the index is
        there.

        Args:
            name (`str`): A name no task of the sequence has.
            adapter (`dict[str, torch.Tensor]`): Its folded adapter.
            config (`LoraConfig`): The configuration it was trained with.
            extensions (`dict[str, BasisExtension]`): What it adds to the basis of each layer.
            steps (`int`), metrics (`dict[str, float]`): For its record.
            training (`dict`): How it was trained, for `training.json`.

        Raises:
            ValueError: if the sequence has a task of that name; nothing is written then.
        """
        if name in self.names:
            raise ValueError(f"The sequence in {self.folder} already has a task {name!r}; choose another name.")
        task_config = folded_config(config, adapter)
        record = TaskRecord(
            name=name,
            folder=f"tasks/{len(self.tasks):02d}-{name}",
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            rank=task_config.r,
            steps=steps,
            metrics=metrics,
        )
        root = concatenate([*self.adapters(), adapter])
        final = self.folder / record.folder
        temporary = final.with_name(f".{final.name}.tmp")
        for leftover in (temporary, final):  # of a run that was killed before the index knew about it
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = {
            _ADAPTER: _tensors(adapter),
            _ADAPTER_CONFIG: _json(_config_dict(task_config)),
            _TRAINING: _json(training),
        }
        if extensions:
            subspace = {f"{layer}.columns": extension.columns.cpu() for layer, extension in extensions.items()}
            subspace |= {
                f"{layer}.captured": torch.tensor(extension.captured, dtype=torch.float64)
                for layer, extension in extensions.items()
            }
            files[_SUBSPACE] = _tensors(subspace)
        for file, data in files.items():
            _write(temporary / file, data)
            record.files[f"{record.folder}/{file}"] = hashlib.sha256(data).hexdigest()
        os.replace(temporary, final)
        _sync_folder(final.parent)
        _write(self.folder / _ADAPTER, _tensors(root))
        _write(self.folder / _ADAPTER_CONFIG, _json(_config_dict(folded_config(config, root))))
        index = {
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model,
            "tasks": [vars(task) for task in [*self.tasks, record]],
        }
        _write(self.folder / INDEX, _json(index))
        self.tasks.append(record)
        return record

    def copy_to(self, folder: str | Path) -> "PublishedSequence":
        """Copies the sequence into a folder that holds none, index last, and opens the copy."""
        folder = Path(folder)
        for task in self.tasks:
            shutil.copytree(self.folder / task.folder, folder / task.folder, dirs_exist_ok=True)
        for file in (_ADAPTER, _ADAPTER_CONFIG, INDEX):
            _write(folder / file, (self.folder / file).read_bytes())
        return PublishedSequence.open(folder)


def describe_base_model(model: nn.Module) -> dict[str, Any]:
    """
    Identity of a base model: its name and revision as far as known, its class, and a hash of all names and shapes.
    """
    config = getattr(model, "config", None)
    shapes = sorted((name.replace(".base_layer", ""), list(p.shape)) for name, p in _base_parameters(model))
    return {
        "name_or_path": getattr(config, "_name_or_path", "") or "",
        "revision": getattr(config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "fingerprint": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
    }


def _base_parameters(model: nn.Module):
    """The parameters that the model had before PEFT wrapped it."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and ".modules_to_save." not in name:
            yield name.replace(".original_module", ""), parameter


def _config_dict(config: LoraConfig) -> dict[str, Any]:
    fields = config.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}


def _tensors(tensors: dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save({key: tensors[key].contiguous() for key in sorted(tensors)}, {"format": "pt"})


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Replaces a file in one step: its old or its new content is there whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere folders cannot be opened, and renames are ordered by the file system
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
