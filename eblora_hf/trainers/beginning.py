"""The sequence that a run begins with: the one in its folder, one from elsewhere, a plain LoRA adapter, or none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..memory.basis import BasisExtension
from ..published.plain_lora import Adapter
from ..published.sequence import PublishedSequence
from ..tasks import Task
from .adoption import check_adoptable, name_of, read_plain, snapshots_of_update
from .callback import TaskSequenceCallback, captured_by, stored_columns, warn_of_caps
from .constrained import ConstrainedMixin
from .opening import check_bases, open_sequence
from .processes import spread_over_processes, together

logger = logging.get_logger(__name__)


class BeginningMixin(ConstrainedMixin):
    """
    Opens the sequence that a run goes on from.

    Attributes:
        protect_data (*optional*): Data of an adapter that becomes the first task.
        skips_learnt (`bool`): Whether tasks that the sequence has are passed over.
    """

    protect_data: Any
    skips_learnt: bool

    def begin_sequence(self, tasks: list[str], resuming: bool) -> None:
        """Opens the sequence for these tasks, and reads its bases."""
        with together("reading what `sequence=` names"):
            plain = None if self.source is None else read_plain(self.source, self.args.hub_token)
        if self.protect_data is not None and plain is None:
            raise ValueError(
                "`protect_data` is for a plain LoRA adapter that becomes the first task, but `sequence` names "
                f"{'a sequence' if self.source is not None else 'nothing'}: leave it out."
            )
        published = open_sequence(
            Path(self.args.output_dir),
            None if plain is not None else self.source,
            self.model.get_base_model(),
            tasks,
            [layer.name for layer in self.layers],
            self.heads.declared,
            label_layer=self.heads.layer,
            heads_of_tasks=self.heads.mode,
            skips_learnt=self.skips_learnt,
            resuming=resuming,
            token=self.args.hub_token,
            writes=self.is_world_process_zero(),
            together=together,
        )
        if plain is not None and not published.tasks:
            published = self._adopt(plain, published, tasks)
        self.heads.go_on_from(published)
        if self.method.remembers:
            check_bases(published, self.eblora_config.method)
        self.remove_callback(TaskSequenceCallback)
        keeps_bases, config = self.method.remembers is not None, self.eblora_config
        self.task_callback = TaskSequenceCallback(
            published, keeps_bases, getattr(torch, config.basis_dtype), config.basis_budget
        )
        self.add_callback(self.task_callback)

    def _adopt(self, adapter: Adapter, published: PublishedSequence, tasks: list[str]) -> PublishedSequence:
        """The new sequence with a plain LoRA adapter as its first task."""
        name, taken = name_of(adapter), {task.lower() for task in tasks}
        while name.lower() in taken:
            name = f"{name[:57]}-before"
        check_adoptable(adapter, self.model.get_base_model(), self.layers, self.heads.declared)
        labels = list(self.model.get_base_model().config.id2label.values()) if self.heads.own else None
        config = self.eblora_config
        extensions = stored_columns(
            self._basis_of(adapter), adapter.state, getattr(torch, config.basis_dtype), config.basis_budget
        )
        record: dict[str, Any] = {
            "eblora_config": {"method": "lora"},
            "basis_of": "the adapter" if self.protect_data is None else "data",
        }
        if extensions:
            record["bases"] = captured_by(extensions)
        warn_of_caps(name, extensions, config.basis_budget)
        with together("writing the first task"):
            if self.args.should_save:
                published.append(
                    name,
                    adapter.state,
                    adapter.config,
                    None if self.method.remembers is None else extensions,
                    steps=0,
                    metrics={},
                    training=record,
                    labels=labels,
                )
        return PublishedSequence.open(published.folder)

    def _basis_of(self, adapter: Adapter) -> dict[str, BasisExtension]:
        """What an adapter adds to the bases: by its data at the weights with it, or by the adapter alone."""
        of = self.method.remembers
        if of is None:
            return {}
        if self.protect_data is None:
            logger.warning(
                f"The basis of {adapter.source} is taken from the adapter alone, which hardly protects it: where it "
                "was measured, no more was left of its task than without any basis. Pass a sample of the data that it "
                "was trained on as `protect_data=`."
            )
            snapshots = snapshots_of_update(adapter, self.layers, of)
        else:
            if not hasattr(self.protect_data, "__getitem__") or isinstance(self.protect_data, str | Mapping):
                raise ValueError(f"`protect_data` must be a data set, got {self.protect_data!r:.100}.")
            if not len(self.protect_data):
                raise ValueError("`protect_data` is empty: pass a sample of what the adapter was trained on.")
            data = self.prepared_alone(Task("protected", self.protect_data))
            self.plan_training()
            self.earlier_tasks.put(self.model, self.layers, adapter.state)
            try:
                snapshots = self.snapshot(data, self.args.seed, of)
            finally:
                self.earlier_tasks.take_off(self.model)
                self.forget_plan()
        return spread_over_processes(lambda share: self.method.end_task(share, snapshots, {}), self.layers)
