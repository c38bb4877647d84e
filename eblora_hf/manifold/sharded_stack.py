"""Factors whose parameters FSDP2 keeps in shards: every process moves the whole factors and keeps its own part."""

import torch

from ..adapters.sharding import gather, scatter
from .stack import FactorStack


class ShardedStack(FactorStack):
    """
    A [`FactorStack`] over sharded parameters. `values` and `gradients` are whole copies, gathered before and scattered
    after every use, one collective for all factors of the stack.

    All processes do the same arithmetic on the same numbers, so that the masters stay the same everywhere.
    """

    def hold(self) -> None:
        """The parameters keep memory of their own."""

    def release(self) -> None:
        """The parameters have memory of their own."""

    def take_gradients(self, rows: slice) -> torch.Tensor:
        gathered = gather(self.gradients_of(rows))
        self.gradients[rows].copy_(self._tall(gathered))
        return self.gradients[rows]

    def give_gradients(self, rows: slice) -> None:
        scatter(self._tall(self.gradients[rows]), self.gradients_of(rows))

    def take_values(self, rows: slice) -> torch.Tensor:
        self.values[rows].copy_(self._tall(gather(self.parameters[rows])))
        return self.values[rows]

    def give_values(self, rows: slice) -> None:
        scatter(self._tall(self.values[rows]), self.parameters[rows])
