"""Interference of a new task with earlier ones: how much of its gradient lies in the subspace kept for them."""

import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from ..adapters.composition import concatenate, with_heads
from ..adapters.states import heads_of
from ..memory.basis import check_gradient
from ..published.loading import fetch_sequence
from ..published.sequence import PublishedSequence
from ..trainers.continual import ContinualMixin


@dataclass(frozen=True)
class LayerInterference:
    """
    Interference in one layer.

    Args:
        layer (`str`): Path of the layer in the base model.
        d_in (`int`): Its inputs.
        columns (`int`): Columns p of the basis F of earlier tasks, `(d_in, p)`.
        share (`float`): ‖G F‖² / ‖G‖², the share of the new task's gradient energy that an update must avoid; 0 where
            the tasks do not meet, 1 where nothing of the gradient is left.
    """

    layer: str
    d_in: int
    columns: int
    share: float

    @property
    def room(self) -> int:
        """Directions d_in - p that are left: the highest rank of a new task."""
        return self.d_in - self.columns


def interference(gradients: dict[str, torch.Tensor], bases: dict[str, torch.Tensor]) -> list[LayerInterference]:
    """
    The share of each layer's gradient energy inside the basis of earlier tasks.

    Args:
        gradients (`dict[str, torch.Tensor]`): Mean gradients G of the new task, `(d_out, d_in)` by layer name.
        bases (`dict[str, torch.Tensor]`): Orthonormal bases F of the earlier tasks, `(d_in, p)` by layer name.

    Returns:
        `list[LayerInterference]`: In the order of `gradients`.

    Raises:
        ValueError: if the layers or shapes do not match, or a gradient is all zero or not finite.
    """
    different = gradients.keys() ^ bases.keys()
    if different:
        raise ValueError(f"Gradients and bases are of different layers: {', '.join(sorted(different))}.")
    rows = []
    for name, gradient in gradients.items():
        gradient, basis = check_gradient(gradient, name).double(), bases[name].double().to(gradient.device)
        if basis.ndim != 2 or basis.shape[0] != gradient.shape[1]:
            raise ValueError(f"{name}: expected a basis ({gradient.shape[1]}, p), got shape {tuple(basis.shape)}.")
        share = ((gradient @ basis).square().sum() / gradient.square().sum()).item()
        d_in, columns = basis.shape
        rows.append(LayerInterference(name, d_in, columns, min(share, 1.0)))  # F is orthonormal to its rounding only
    return rows


def interference_report(trainer: ContinualMixin) -> list[LayerInterference]:
    """
    Says before training how far a new task interferes with the tasks of a published sequence.

    Takes the gradient snapshot that `trainer.train()` would start the task from, on the model with all earlier tasks,
    and compares it with their bases. The sequence is only read, and the model is left as it was.

    Args:
        trainer ([`ContinualEBLoRATrainer`]): Freshly built with `sequence=…` and the data of the new task; of several
            tasks the first is taken.

    Returns:
        `list[LayerInterference]`: By layer, in the order of the model.

    Raises:
        ValueError: if the trainer has no sequence or no data, or was trained already; or if the sequence keeps no
            bases, or is of another model or other layers.
        FileNotFoundError: if there is no sequence, or its bases were not published with it.

    Example:

    ```python
    trainer = ContinualEBLoRATrainer(model, args, sequence="out", train_dataset=new_task, peft_config=peft_config)
    for row in interference_report(trainer):
        print(row.layer, row.share, row.room)
    ```
    """
    if trainer.source is None or trainer.tasks is None:
        raise ValueError(
            "The report compares a new task with a published sequence: build the trainer with `sequence=…` and the "
            "task's `train_dataset`."
        )
    if trainer.storage_of("gradients").sketch is not None:
        raise ValueError(
            "The report needs whole gradients, not sketches of them: build the trainer with `snapshot_offload=True`, "
            "which keeps them in the memory of the CPU, and without `snapshot_sketch`."
        )
    if trainer.task_callback is not None:
        raise ValueError("The trainer was trained already. Build a fresh one, with the next task's data.")
    with tempfile.TemporaryDirectory() as folder:
        # a copy brings the bases from a repository of their own, if that is where they are
        local = PublishedSequence.exists(trainer.source)
        published = fetch_sequence(trainer.source, token=trainer.args.hub_token, folder=None if local else folder)
        without = published.names_without_basis()
        if without:
            raise ValueError(
                f"The task(s) {', '.join(without)} in {trainer.source} were learnt by a method that keeps no basis: "
                "there is nothing to compare with."
            )
        published.check_base_model(trainer.model.get_base_model())
        published.check_layers([layer.name for layer in trainer.layers])
        bases, earlier = published.bases(), concatenate(published.adapters())
    seed = trainer.args.seed + len(published.tasks)
    with with_heads(trainer.model, trainer.adapter, heads_of(earlier)):
        try:
            trainer.earlier_tasks.put(trainer.model, trainer.layers, earlier)
            gradients: Any = trainer.snapshot(trainer.tasks.tasks[0].train_dataset, seed)
        finally:
            trainer.earlier_tasks.take_off(trainer.model)
    return interference(gradients, bases)
