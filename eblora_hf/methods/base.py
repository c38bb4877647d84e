"""What a continual-learning method answers: how a task starts, what constrains its steps, what is remembered of it."""

from typing import Any, Literal

import torch

from ..adapters.layers import AdaptedLayer
from ..config import EBLoRAConfig
from ..manifold.penalty import Curvature
from ..manifold.step_hooks import StepHooks
from ..memory.basis import BasisExtension, column_cap, extend_basis, outside, principal_directions
from ..memory.sketch import Sketch, extend_basis_from_sketch, principal_directions_from_sketch

Tensors = dict[str, torch.Tensor]
Snapshots = dict[str, torch.Tensor | Sketch]
Snapshot = Literal["gradients", "token-gradients", "features", "curvature"]


class Method:
    """
    A method over the one trainer. This base class is plain sequential LoRA in every answer; subclasses override.

    Args:
        config ([`EBLoRAConfig`]): The options.

    Attributes:
        constrained (`bool`): Whether `constrain` attaches hooks, whose state is then part of a checkpoint.
        orthonormal (`bool`): Whether both factors stay orthonormal: r is then at most the smaller side of a weight,
            and weight decay means nothing.
        trains_lora_A (`bool`): Whether lora_A is trained, or frozen where `begin_task` put it.
        starts_from (`str`, *optional*): The snapshot of the new task that `begin_task` needs: `"gradients"`, the mean
            gradient G `(d_out, d_in)` of each layer; or the second moment `(d_in, d_in)` of its tokens' gradients
            (`"token-gradients"`) or of its inputs (`"features"`); or both sides of the former (`"curvature"`).
        merges_earlier_tasks (`bool`): Whether weights that hold the updates of earlier tasks will do for it; not if it
            looks at the weights without them, or at the updates themselves.
        remembers (`str`, *optional*): The snapshot at the trained weights that `end_task` extends bases from.
        anchored (`bool`): Whether an anchor holds the answers of the model while it is trained; the trainer says so.
        curvatures (`dict[str, Curvature]`): By layer name that of the tasks learnt so far, if there is any; the
            trainer says so.
    """

    constrained = False
    orthonormal = False
    trains_lora_A = True
    merges_earlier_tasks = True
    starts_from: Snapshot | None = None
    remembers: Snapshot | None = None
    anchored = False

    def __init__(self, config: EBLoRAConfig):
        self.config = config
        self.curvatures: dict[str, Curvature] = {}

    # ---- how a task starts ----

    def ranks(self, layers: list[AdaptedLayer]) -> dict[str, int]:
        """The rank of the task's adapter by layer name, for a method that does not leave it to the `LoraConfig`."""
        return {}

    def begin_task(self, layers: list[AdaptedLayer], snapshot: Snapshots, bases: Tensors) -> dict[str, Any]:
        """
        Initialises the fresh adapter of a task.

        Args:
            layers (`list[AdaptedLayer]`): Layers with a fresh adapter: A drawn as PEFT does, B zero. On several
                processes each gets a share of them.
            snapshot (`dict[str, torch.Tensor]`): What `starts_from` names, by layer; empty if nothing.
            bases (`dict[str, torch.Tensor]`): Bases `(d_in, p)` of the tasks before by layer; empty before the first.

        Returns:
            `dict`: By layer what `constrain` needs; the same on all processes afterwards.
        """
        return {}

    # ---- what constrains its steps ----

    def constrain(
        self,
        optimizer: torch.optim.Optimizer,
        layers: list[AdaptedLayer],
        start: dict[str, Any],
        bases: Tensors,
        num_training_steps: int,
    ) -> StepHooks | None:
        """
        Attaches what acts around the optimizer's steps, for a task of so many of them. `None` for nothing.
        """
        return None

    def resume(self, layers: list[AdaptedLayer], state: Tensors) -> dict[str, Any]:
        """What `begin_task` had returned, from the state of the hooks in a checkpoint."""
        return {}

    # ---- what is remembered of it ----

    def finish_training(self, layers: list[AdaptedLayer]) -> None:
        """Changes the trained adapter, in place, into what is stored of it."""

    def end_task(self, layers: list[AdaptedLayer], snapshot: Snapshots, bases: Tensors) -> dict[str, BasisExtension]:
        """What the task adds to the basis of each layer, from the snapshot that `remembers` names."""
        return {}

    @property
    def energy_threshold(self) -> float:
        """ε of the configuration, or what suits the snapshot: a second moment spreads over more directions."""
        if self.config.energy_threshold is not None:
            return self.config.energy_threshold
        return 0.99 if self.remembers == "gradients" else 0.97

    def extend(
        self, layer: AdaptedLayer, matrix: torch.Tensor | Sketch, basis: torch.Tensor | None, beyond: int = 0
    ) -> BasisExtension:
        """
        The extension of a layer's basis by GPM's energy rule, within the cap of the configuration, and so many
        directions beyond it.
        """
        columns = 0 if basis is None else basis.shape[1]
        cap = column_cap(layer.d_in, layer.rank, columns, self.config.max_basis_fraction)
        options: Any = {"threshold": self.energy_threshold, "max_columns": cap, "beyond": beyond, "name": layer.name}
        if isinstance(matrix, Sketch):
            if self.config.snapshot_sketch is None:  # nobody asked for it, so that its reach is a cap like another
                options |= {"max_columns": min(cap, len(matrix.matrix) // 2), "may_miss": True}
            return extend_basis_from_sketch(matrix, basis, **options)
        return extend_basis(
            matrix.to(layer.weight.device), basis, second_moment=self.remembers != "gradients", **options
        )

    def principal(
        self, layer: AdaptedLayer, matrix: torch.Tensor | Sketch, basis: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The leading singular triplets of a layer outside a basis, from the snapshot that the task starts from."""
        if isinstance(matrix, Sketch):
            return principal_directions_from_sketch(matrix, layer.rank, basis, name=layer.name)
        matrix = matrix.to(layer.weight.device)
        if self.starts_from != "gradients":  # of a second moment, both sides
            matrix = outside(matrix, None if basis is None else basis.to(matrix), second_moment=True)
        return principal_directions(matrix, layer.rank, basis, name=layer.name)
