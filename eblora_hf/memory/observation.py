"""The moments of a task's token gradients, summed in the backward passes that train it anyway."""

import contextlib
import math
from collections.abc import Iterator

import torch

from ..adapters.layers import AdaptedLayer
from .accumulators import Storage
from .curvature import CurvatureMoments, joined_moments, output_moments
from .gradients import watched_gradients
from .moments import Moments, squared_norms
from .sketch import Sketch

_TOKENS_PER_INPUT = 8  # tokens that stand for all of a training, for each input of a layer


class Observation:
    """
    The second moment of the gradients of single tokens, [`token_gradient_moments`], of the training steps within
    [`watching`]. Of each pass as many tokens are taken as are needed to know the moment, not all.

    With `both_sides` also the moments of the gradients at the layers' outputs, [`curvature_moments`].

    Args:
        layers (`list[AdaptedLayer]`): The layers that are trained.
        storage ([`Storage`]): Where the sums are kept, and whether they are sketches.
        bases (`dict[str, torch.Tensor]`): Bases of the tasks before by layer name, for sketches.
        passes (`int`): How many forward and backward passes of this process will be watched.
        processes (`int`, defaults to 1): How many processes watch as many.
        may_overflow (`bool`, defaults to `False`): Whether gradients may be infinite, as those of float16 may. The
            tokens that have such gradients count for nothing; the optimizer makes no step of them either.
        both_sides (`bool`, defaults to `False`): Whether the outputs are observed as well.

    Attributes:
        steps (`int`): Optimizer steps of which passes have been watched.
    """

    def __init__(
        self,
        layers: list[AdaptedLayer],
        storage: Storage,
        bases: dict[str, torch.Tensor],
        passes: int,
        *,
        processes: int = 1,
        may_overflow: bool = False,
        both_sides: bool = False,
    ):
        self._layers, self._may_overflow = layers, may_overflow
        self._moments = Moments(layers, storage, bases)
        self._outputs = output_moments(layers, storage) if both_sides else None
        self._items = torch.zeros((), dtype=torch.float64)  # of the loss, in the steps that were watched
        passes *= processes
        self._tokens = {layer.name: math.ceil(_TOKENS_PER_INPUT * layer.d_in / passes) for layer in layers}
        self.steps, self._newest = 0, -1

    @contextlib.contextmanager
    def watching(self, step: int, items: float | torch.Tensor, scale: float | torch.Tensor = 1.0) -> Iterator[None]:
        """
        Within the context backward passes are summed up.

        Args:
            step (`int`): Number of the optimizer step that they are part of.
            items (`float`): By how many items the loss of that step is divided, on this process.
            scale (`float`, defaults to 1.0): What the loss is multiplied by beside.
        """
        scale = items / scale

        def see(layer: AdaptedLayer, x: torch.Tensor, delta: torch.Tensor) -> None:
            weights = squared_norms(delta, scale)
            if self._may_overflow:
                weights = torch.where(torch.isfinite(weights), weights, 0.0)
                x = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
            self._moments.add(layer, x, weights, self._tokens[layer.name])
            if self._outputs is not None:
                rows = delta.to(layer.sum_dtype) * scale
                if self._may_overflow:  # a token with an infinite gradient counts for nothing on either side
                    rows = torch.nan_to_num(rows, 0.0, 0.0, 0.0) * (weights > 0.0).unsqueeze(-1)
                self._outputs.add(layer, rows)

        with watched_gradients(self._layers, see):
            yield
        if step != self._newest:
            self.steps += 1
            self._items = self._items.to(getattr(items, "device", "cpu")) + items
        self._newest = step

    def missing(self) -> list[str]:
        """The layers of which no process has seen anything."""
        return self._moments.missing()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What this process has summed up so far, to go on from."""
        state = self._moments.state_dict() | {"steps": torch.tensor(self.steps), "items": self._items}
        outputs = {} if self._outputs is None else self._outputs.state_dict()
        return state | {f"outputs of {name}": value for name, value in outputs.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Adds the sums that a `state_dict` holds."""
        self._moments.load_state_dict(state)
        self._items += state.get("items", 0.0)
        if self._outputs is not None:
            mark = "outputs of "
            own = {key.removeprefix(mark): value for key, value in state.items() if key.startswith(mark)}
            self._outputs.load_state_dict(own)

    def means(self) -> dict[str, torch.Tensor | Sketch] | dict[str, CurvatureMoments]:
        """By layer name the mean over the tokens of all processes; the sums are let go."""
        if self._outputs is None:
            return self._moments.means()
        return joined_moments(self._moments, self._outputs, self._items)
