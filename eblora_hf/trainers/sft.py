"""`ContinualEBLoRASFTTrainer`: the continual trainer over TRL's `SFTTrainer`, which has to be installed."""

import copy
import dataclasses
from typing import Any

try:
    from trl import SFTTrainer
    from trl.trainer.utils import create_model_from_path
except ImportError as error:
    raise ImportError(
        "ContinualEBLoRASFTTrainer needs TRL, which could not be imported. Install it: pip install 'eblora-hf[trl]'."
    ) from error

from ..config import TaskSequence
from ..methods.base import Snapshot, Snapshots
from .continual import ContinualMixin


class ContinualEBLoRASFTTrainer(ContinualMixin, SFTTrainer):
    """
    `trl.SFTTrainer` that learns tasks one after another, as [`ContinualEBLoRATrainer`] does.

    Takes the arguments of `SFTTrainer`, and those of [`ContinualMixin`] by keyword. Every task's data are prepared as
    `SFTTrainer` prepares its own: chat template, formatting function, tokenisation, packing.
    """

    def __init__(self, *args, **kwargs):
        arguments = self._by_name(args, kwargs)
        if isinstance(arguments.get("model"), str):
            arguments = _with_model(arguments)
        super().__init__(**arguments)
        if self.tasks is not None and not self._skip_prepare_dataset:
            self._prepare_tasks()

    def _prepare_tasks(self) -> None:
        first, *others = self.tasks
        if self.args.completion_only_loss is None:  # SFTTrainer has decided it by the first
            columns = {task.name: getattr(task.train_dataset, "column_names", ()) for task in self.tasks}
            completions = {name: "completion" in names for name, names in columns.items()}
            if len(set(completions.values())) > 1:
                raise ValueError(
                    f"The tasks {', '.join(name for name, has in completions.items() if has)} have prompts and "
                    "completions and the others have not, so that their losses are of other tokens. Say which with "
                    "SFTConfig(completion_only_loss=…), or bring all tasks into one format."
                )
        prepared = [dataclasses.replace(first, train_dataset=self.train_dataset)]
        for task in others:
            dataset = self._prepare_dataset(
                task.train_dataset,
                self.processing_class,
                self.args,
                self.args.packing,
                self._formatting_func,
                task.name,
            )
            prepared.append(dataclasses.replace(task, train_dataset=dataset))
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {first.name: self.eval_dataset}
        self.tasks = TaskSequence(
            [
                dataclasses.replace(task, eval_dataset=task.eval_dataset and sets.get(task.name, task.eval_dataset))
                for task in prepared
            ]
        )

    def snapshot(self, dataset: Any, seed: int, of: Snapshot | None = "gradients") -> Snapshots:
        metrics = copy.deepcopy(self._metrics)
        try:
            return super().snapshot(dataset, seed, of)
        finally:
            self._metrics = metrics  # the loss function logs what a snapshot is no part of


def _with_model(arguments: dict[str, Any]) -> dict[str, Any]:
    """Loads a model that was given by its name, as SFTTrainer would."""
    arguments = dict(arguments)
    args = arguments.get("args")
    options = dict(getattr(args, "model_init_kwargs", None) or {})
    quantization = arguments.pop("quantization_config", None)
    if quantization is not None:
        options["quantization_config"] = quantization
    if args is not None and options:
        arguments["args"] = copy.copy(args)
        arguments["args"].model_init_kwargs = None
    arguments["model"] = create_model_from_path(arguments["model"], **options)
    return arguments
