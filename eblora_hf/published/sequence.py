"""The published sequence on disk: an index, one folder per task that is never changed again, and all tasks as one
adapter.

    eblora_sequence.json                              index: format, base model, tasks in order, sha256 of all files
    adapter_config.json, adapter_model.safetensors    all tasks as one stock LoRA (derived from the task folders)
    tasks/00-<name>/adapter_config.json, …            that task's update alone (base + its ΔW), stock LoRA
    tasks/00-<name>/subspace.safetensors              the columns this task added to each layer's basis, its curvature
    tasks/00-<name>/training.json                     how it was trained

A task folder is written under a temporary name, synced and renamed; the index is replaced last. A crash leaves the old
sequence or the new one. In between, the adapter of all tasks may be newer than the index: a reader refuses it, and the
next writer derives it again.
"""

import datetime
import hashlib
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from ..adapters.composition import concatenate
from ..adapters.states import AdapterState, factors_of, folded_config
from ..manifold.penalty import Curvature
from ..memory.basis import BasisExtension
from .adapter_files import (
    check_factors,
    check_fits,
    config_of,
    read_adapter_file,
    read_tensors,
    readable_targets,
)
from .checks import check_finite, check_new_names, matches, verify
from .files import json_bytes, sync_folder, temporary_name, tensor_bytes, write
from .identity import check_same_model
from .index import ADAPTER, ADAPTER_CONFIG, FORMAT_VERSION, INDEX, SUBSPACE, TRAINING, Heads, Index, TaskRecord
from .locks import one_writer
from .owner import settings_of
from .remembered import read_bases, read_curvatures
from .schema import MAX_JSON, BaseModelIdentity, TrainingRecord, as_plain, check_training, read_checked
from .strays import check_links, check_strays
from .task_files import task_files


class PublishedSequence:
    """
    The tasks learnt so far, in a folder.

    Args:
        folder (`str` or `Path`): Where the sequence is, or will be at the first `append`.
        base_model (`dict`): Identity of the base model, see [`describe_base_model`].
        tasks (`list[TaskRecord]`): The tasks already there; use [`PublishedSequence.open`] to read them.
        bases (`str`, defaults to `"included"`): Where the bases are: in the task folders, `"withheld"`, or a Hub repo.
        heads (`str`, defaults to `"shared"`): As in [`EBLoRAConfig`].
    """

    def __init__(
        self,
        folder: str | Path,
        base_model: BaseModelIdentity,
        tasks: list[TaskRecord] | None = None,
        *,
        bases: str = "included",
        heads: Heads = "shared",
    ):
        self.folder = Path(folder)
        self.base_model = base_model
        self.tasks = tasks or []
        self.bases_at = bases
        self.heads = heads

    def __repr__(self) -> str:
        return f"PublishedSequence({str(self.folder)!r}, tasks={self.names}, bases={self.bases_at!r})"

    @staticmethod
    def exists(folder: str | Path) -> bool:
        return (Path(folder) / INDEX).is_file()

    @classmethod
    def open(cls, folder: str | Path, *, repair: bool = False) -> "PublishedSequence":
        """
        Reads the index and verifies every file in it.

        Args:
            folder (`str` or `Path`): The sequence.
            repair (`bool`, defaults to `False`): Write the adapter of all tasks again from the task folders if it does
                not fit the index, as after a crash. For a process that owns the sequence.

        Raises:
            FileNotFoundError: if there is no sequence, or a file of it is missing.
            ValueError: if the index is not readable or of a newer format, or a file was changed; the message names it.
        """
        path = Path(folder) / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no sequence: there is no {INDEX} in it.")
        index = Index.read(path)
        sequence = cls(folder, index.base_model, index.tasks, bases=index.bases, heads=index.heads)
        for task in index.tasks:
            for name, digest in task.files.items():
                if not name.endswith(SUBSPACE) or sequence.bases_at == "included" or (sequence.folder / name).exists():
                    verify(sequence.folder / name, digest, f"of the task {task.name!r}")
        if repair and any(not matches(sequence.folder / name, digest) for name, digest in index.files.items()):
            sequence.write_root()
        for name, digest in index.files.items():
            verify(sequence.folder / name, digest, "of all tasks")
        return sequence

    def check_base_model(self, model: nn.Module) -> None:
        """
        Raises if `model` has other weights, by name, shape or value, than the one the tasks were learnt on.

        Raises:
            ValueError: naming both.
        """
        check_same_model(self.base_model, model, f"The sequence in {self.folder}")

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    def select(self, upto: str | None = None, exclude: Collection[str] = ()) -> list[str]:
        """
        Names of the tasks up to one of them (included), without some.

        Raises:
            ValueError: for a name that no task has, or if nothing is left.
        """
        unknown = {name for name in (*exclude, *([] if upto is None else [upto])) if name not in self.names}
        if isinstance(exclude, str) or unknown:
            raise ValueError(f"upto={upto!r}, exclude={exclude!r}: expected names out of {', '.join(self.names)}.")
        last = len(self.tasks) if upto is None else self.names.index(upto) + 1
        chosen = [name for name in self.names[:last] if name not in exclude]
        if not chosen:
            raise ValueError(
                f"upto={upto!r}, exclude={list(exclude)!r} leave none of the tasks {', '.join(self.names)}."
            )
        return chosen

    def labels_of_head(self, name: str) -> list[str]:
        """The labels of the head in a task's folder, in the order of its rows; empty if they are not known."""
        index = self.names.index(name)
        held = self.tasks[: index + 1] if self.heads == "grow" else self.tasks[index : index + 1]
        return list(dict.fromkeys(label for task in held for label in task.labels or ()))

    def names_without_basis(self) -> list[str]:
        """Tasks learnt by a method that keeps none."""
        return [task.name for task in self.tasks if not task.has_basis]

    def check_layers(self, names: list[str]) -> None:
        """
        Raises if a new task would adapt other layers than the tasks of the sequence.

        Raises:
            ValueError: naming the layers in which they differ.
        """
        if self.tasks:
            different = set(names) ^ set(factors_of(self.adapters([self.tasks[0].name])[0], "lora_A"))
            if different:
                raise ValueError(
                    f"The tasks of a sequence adapt the same layers, but the new one and those in {self.folder} "
                    f"differ in {', '.join(sorted(different))}. Use the `target_modules` of the earlier tasks."
                )

    def check_adapters(self, model: nn.Module) -> set[str]:
        """
        Raises if the tensors of a task have other names or shapes than what they change on the model.

        Returns the names of the `modules_to_save` that tasks have trained.

        Raises:
            ValueError: naming the file and the tensor.
        """
        heads: set[str] = set()
        for task, adapter in zip(self.tasks, self.adapters(), strict=True):
            file = read_adapter_file(self.folder / task.folder / ADAPTER_CONFIG)
            rows = (self.base_model.get("label_layer"), len(self.labels_of_head(task.name)))
            check_fits(adapter, file.modules_to_save or [], model, self.folder / task.folder / ADAPTER, rows)
            heads |= set(config_of(file, adapter).modules_to_save or [])
        return heads

    def adapters(self, names: list[str] | None = None) -> list[AdapterState]:
        """The folded adapter of each task, or of some in the order of `names`."""
        tasks = self.tasks if names is None else [self.tasks[self.names.index(name)] for name in names]
        adapters = []
        for task in tasks:
            path = self.folder / task.folder / ADAPTER
            adapters.append(read_tensors(path))
            check_factors(adapters[-1], path)
        return adapters

    def config(self) -> LoraConfig:
        """The configuration of the newest task's adapter, folded."""
        newest = self.tasks[-1]
        file = read_adapter_file(self.folder / newest.folder / ADAPTER_CONFIG)
        return config_of(file, self.adapters([newest.name])[0])

    def training(self) -> list[TrainingRecord]:
        """How each task was trained."""
        paths = [self.folder / task.folder / TRAINING for task in self.tasks]
        return [read_checked(path, "record of a training", MAX_JSON, check_training) for path in paths]

    def bases(self) -> dict[str, torch.Tensor]:
        """
        Per layer name the basis of all tasks, `(d_in, p)` in float32: the concatenation of what each task added.

        Raises:
            FileNotFoundError: if the bases were not published with the sequence.
            ValueError: if what a task added is not complete, or not orthonormal; the message names the file.
        """
        return read_bases(self.folder, self.tasks, self.bases_at)

    def curvatures(self) -> dict[str, list[Curvature]]:
        """
        Per layer name the curvatures of the tasks that have one, in their order.

        Raises:
            ValueError: if one does not fit its layer; the message names the file.
        """
        return read_curvatures(self.folder, self.tasks)

    def append(
        self,
        name: str,
        adapter: AdapterState,
        config: LoraConfig,
        extensions: dict[str, BasisExtension] | None,
        *,
        steps: int,
        metrics: dict[str, float],
        training: dict[str, Any],
        labels: list[str] | None = None,
        root_metrics: dict[str, float] | None = None,
    ) -> TaskRecord:
        """
        Adds a finished task. Its folder appears under its name only when complete, and counts only once the index is
        there.

        Args:
            name (`str`): A name no task of the sequence has.
            adapter (`dict[str, torch.Tensor]`): Its folded adapter.
            config (`LoraConfig`): The configuration it was trained with.
            extensions (`dict[str, BasisExtension]`, *optional*): What it adds to the basis of each layer; nothing to
                that of a layer left out. `None` if it was learnt by a method that keeps no basis.
            steps (`int`), metrics (`dict[str, float]`): For its record.
            training (`dict`): How it was trained, for `training.json`.
            labels (`list[str]`, *optional*), root_metrics (`dict[str, float]`, *optional*): As in [`TaskRecord`].

        Raises:
            ValueError: if the sequence has a task of that name, or other layers, or its folder holds tasks that it
                does not know, or something is given that a reader would refuse; nothing is written then.
        """
        check_new_names([name], self.names, self.folder)
        columns = {f"the basis of {layer}": extension.columns for layer, extension in (extensions or {}).items()}
        check_finite(name, adapter | columns)
        check_factors(adapter, f"The adapter of {name!r}")
        concatenate([*self.adapters(), adapter])  # raises for other layers, before anything is written
        task_config = folded_config(config, adapter)
        files = task_files(name, adapter, self._config_dict(task_config), extensions, training)
        folder = f"tasks/{len(self.tasks):02d}-{name}"
        record = TaskRecord(
            name=name,
            folder=folder,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            rank=task_config.r,
            steps=steps,
            metrics={key: as_plain(value) for key, value in metrics.items()},
            files={f"{folder}/{file}": hashlib.sha256(data).hexdigest() for file, data in files.items()},
            labels=labels,
            root_metrics=None if root_metrics is None else {k: as_plain(value) for k, value in root_metrics.items()},
        )
        grown = self.part([*self.tasks, record])
        Index.checked(json.dumps(grown._index({ADAPTER: "0" * 64, ADAPTER_CONFIG: "0" * 64})).encode())
        check_links(self.folder)
        with one_writer(self.folder, "append", patience=60.0):
            self.check_unchanged()
            check_strays(self.folder, self.tasks, name)
            final = self.folder / folder
            # of a run that was killed before the index knew about it
            for leftover in (final, *final.parent.glob(".*.tmp")):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary = temporary_name(final)
            for file, data in files.items():
                write(temporary / file, data)
            os.replace(temporary, final)
            sync_folder(final.parent)
            for file, data in grown.state_after(len(grown.tasks), local=True).items():  # index last
                write(self.folder / file, data)
        self.tasks.append(record)
        return record

    def check_unchanged(self) -> None:
        """Raises a `ValueError` if another process has appended a task since this one has read the index."""
        path = self.folder / INDEX
        on_disk = Index.read(path).tasks if path.is_file() else []
        if [vars(task) for task in on_disk] != [vars(task) for task in self.tasks]:
            raise ValueError(
                f"Another process has changed the sequence in {self.folder}: it has the tasks "
                f"{', '.join(task.name for task in on_disk) or 'none'}, and had {', '.join(self.names) or 'none'}. "
                "Nothing was appended. Open it again, and go on from what is there."
            )

    def state_after(self, count: int, *, local: bool = False) -> dict[str, bytes]:
        """
        The files in the root of the sequence after its first `count` tasks: their sum as one adapter, and the index.

        Args:
            count (`int`): How many tasks.
            local (`bool`, defaults to `False`): Whether the files stay on this machine, so that a base model without a
                name on the Hub is named by its path.
        """
        part = self.part(self.tasks[:count])
        adapter = concatenate(part.adapters())
        file = read_adapter_file(self.folder / part.tasks[-1].folder / ADAPTER_CONFIG)
        config = readable_targets(config_of(file, adapter), file)
        base = settings_of(self.folder).get("base_model") if local else None
        root = {ADAPTER: tensor_bytes(adapter), ADAPTER_CONFIG: json_bytes(self._config_dict(config, base))}
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in root.items()}
        return {**root, INDEX: json_bytes(part._index(digests))}  # the index last

    def part(self, tasks: list[TaskRecord], *, bases: str | None = None) -> "PublishedSequence":
        """The sequence in the same folder with some of its tasks, or with its `bases` elsewhere."""
        where = self.bases_at if bases is None else bases
        return PublishedSequence(self.folder, self.base_model, list(tasks), bases=where, heads=self.heads)

    def _index(self, root: dict[str, str]) -> dict[str, Any]:
        """The content of the index, for the sha256 of the files in the root."""
        return Index(FORMAT_VERSION, self.base_model, self.bases_at, root, self.tasks, self.heads).content()

    def _config_dict(self, config: LoraConfig, local_base: str | None = None) -> dict[str, Any]:
        """What stock PEFT reads. The base model is named as on the Hub, or by its path where the file stays here."""
        name = self.base_model["name_or_path"] or local_base
        fields = config.to_dict() | {"base_model_name_or_path": name, "revision": self.base_model["revision"]}
        return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}

    def write_root(self) -> None:
        """Writes the adapter of all tasks again, as the index describes it."""
        check_links(self.folder)
        for file, data in self.state_after(len(self.tasks), local=True).items():
            write(self.folder / file, data)
