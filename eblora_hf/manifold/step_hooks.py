"""What a method does around each step of any torch optimizer, through the optimizer's own hooks."""

import torch
from torch.utils.hooks import RemovableHandle

from ..adapters.factors import Factors
from .optimizers import plain_optimizer


class StepHooks:
    """
    Calls `before_step` and `after_step` around every step that an optimizer really makes; subclasses override them.

    Gradients are synchronised, unscaled (but by fused optimizers) and clipped when `before_step` sees them.

    Args:
        optimizer (`torch.optim.Optimizer`): Any optimizer whose `step` needs no closure, or accelerate's wrapper of
            one.

    Raises:
        ValueError: if the optimizer is of a kind that no hook can follow.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = plain_optimizer(optimizer)
        self._handles: list[RemovableHandle] = []
        self._under_way = False

    def attach(self) -> None:
        """Registers the hooks."""
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Removes the hooks; the model keeps its factors."""
        for handle in self._handles:
            handle.remove()

    def before_step(self) -> None:
        """Runs before the optimizer reads gradients and parameters."""

    def after_step(self) -> None:
        """Runs after the optimizer has changed the parameters."""

    @property
    def gradient_scale(self) -> torch.Tensor | float:
        """By what the gradients are multiplied at `before_step`: a fused optimizer unscales inside its own kernel."""
        scale = getattr(self.optimizer, "grad_scale", None)
        return 1.0 if scale is None else scale

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):  # args[0] is the optimizer
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() was given a closure, which would recompute the gradients after "
                "they were projected. Compute gradients first, then call step() without arguments."
            )
        if self._under_way:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() calls a step of its base class, which would be constrained twice "
                "(or a step before this one failed half-way). Use the base class, or call its `step` outside."
            )
        # A fused optimizer with a gradient scaler is called even when gradients overflowed and skips the step by
        # itself
        found_inf = getattr(optimizer, "found_inf", None)
        self._skipped = found_inf is not None and bool(found_inf)
        if not self._skipped:
            self._under_way = True
            self.before_step()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not self._skipped:
            self.after_step()
            self._under_way = False

    # ---- what the trainer records and saves ----

    def factors(self) -> dict[str, Factors]:
        """By layer name, factors in full precision to publish instead of parameters that may have rounded them."""
        return {}

    @property
    def bases(self) -> dict[str, torch.Tensor]:
        """By layer name the basis `(d_in, p)` that it keeps a factor out of, on the factor's device."""
        return {}

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates of its own, for the record of a task."""
        return {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint needs beside the adapter and the optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores a `state_dict`."""
