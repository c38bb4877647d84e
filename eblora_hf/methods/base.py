"""What a continual-learning method answers: how a task starts, what constrains its steps, what is remembered of it."""

import torch

from ..config import EBLoRAConfig
from ..constraint import StiefelConstraint
from ..factors import Factors
from ..layers import AdaptedLayer
from ..subspace import BasisExtension

Tensors = dict[str, torch.Tensor]


class Method:
    """
    A method over the one trainer. This base class is plain sequential LoRA in every answer; subclasses override.

    Args:
        config ([`EBLoRAConfig`]): The options.

    Attributes:
        constrained (`bool`): Whether `constrain` attaches a constraint, whose state is then part of a checkpoint.
        uses_gradients (`bool`): Whether `begin_task` needs the gradient snapshot of the new task.
        keeps_bases (`bool`): Whether `end_task` needs a snapshot at the trained weights and extends bases.
    """

    constrained = False
    uses_gradients = False
    keeps_bases = False

    def __init__(self, config: EBLoRAConfig):
        self.config = config

    def begin_task(self, layers: list[AdaptedLayer], gradients: Tensors, bases: Tensors) -> dict[str, Factors]:
        """
        Initialises the fresh adapter of a task.

        Args:
            layers (`list[AdaptedLayer]`): The layers with the fresh adapter, whose B is zero.
            gradients (`dict[str, torch.Tensor]`): Mean gradients `(d_out, d_in)` by layer; empty if not used.
            bases (`dict[str, torch.Tensor]`): Bases `(d_in, p)` of the tasks before by layer; empty before the first.

        Returns:
            `dict[str, Factors]`: The factors that the constraint takes over; empty for an unconstrained method.
        """
        return {}

    def constrain(
        self,
        optimizer: torch.optim.Optimizer,
        layers: list[AdaptedLayer],
        factors: dict[str, Factors],
        bases: Tensors,
        num_training_steps: int,
    ) -> StiefelConstraint | None:
        """
        Attaches what keeps the optimizer's steps on the manifold, for a task of so many steps. `None` for nothing.
        """
        return None

    def end_task(self, layers: list[AdaptedLayer], gradients: Tensors, bases: Tensors) -> dict[str, BasisExtension]:
        """What the task adds to the basis of each layer, from the gradients at the trained weights."""
        return {}
