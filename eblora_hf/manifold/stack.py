"""Factors of one shape side by side in memory, so that a step on all of them is a handful of batched calls."""

from functools import partial

import torch
from torch import nn

from ..adapters.sharding import gather
from . import maps

_CACHE = 2**21  # bytes of one tensor of a run on a CPU: what a step touches of it then stays close to the core
_PADDED = 1.25  # how much wider than its own a basis may be padded


class FactorStack:
    """
    Factors of one shape, each kind of tensor in one piece of memory that lives as long as the stack.

    The parameters' data become slices of it, and in every step their gradients, so that each operation is one batched
    call and nothing is gathered or scattered. All tensors are `(n, d, r)`; those of V are views of lora_A's order `(n,
    r, d)`.

    Args:
        masters (`list[torch.Tensor]`): U or V of each factor, `(d, r)`, float32 or wider.
        bases (`list[torch.Tensor]`, *optional*): Their bases, `(d, p)`; narrower ones are padded with zero columns.
        parameters (`list[nn.Parameter]`): lora_B where the factor is U, lora_A where it is V.
        layers (`list[int]`): Index of the layer of each factor.
        is_v (`bool`): Whether the factors are V: its parameter lora_A is stored transposed.
        step_factor (`float`): κ, by which the optimizer's increments of the parameters are multiplied.
        s (`list[float]`, *optional*), scaling (`list[float]`, *optional*): For U the singular value and PEFT's scaling
            γ of each layer.

    Attributes:
        x, values, gradients (`torch.Tensor`): The masters, the parameters and their gradients.
        basis (`torch.Tensor` of shape `(n, d, p)`, *optional*): The bases.
        bases (`list[torch.Tensor]`): Of each factor its own in it, `(d, p)`, or `None`.
        s, s_gradients (`torch.Tensor` of shape `(n,)`): The singular values, of which `scales` are slices.
        scales (`list[nn.Parameter]`): One of shape `(1,)` for each factor U.
        exact_bases (`bool`): Whether the bases are orthonormal to rounding; those of released files are not.
        on_manifold (`list[bool]`): Whether each master is orthonormal and outside its basis, to rounding.
    """

    def __init__(
        self,
        masters: list[torch.Tensor],
        bases: list[torch.Tensor] | None,
        parameters: list[nn.Parameter],
        layers: list[int],
        is_v: bool,
        step_factor: float,
        s: list[float] | None = None,
        scaling: list[float] | None = None,
    ):
        self.parameters, self.layers, self.is_v, self.step_factor = parameters, layers, is_v, step_factor
        self.x = self._tall(torch.stack([x.mT if is_v else x for x in masters]))
        self.basis: torch.Tensor | None = None
        restrictions: list[torch.Tensor | None] = [None] * len(masters)
        if bases is not None:
            widths = [basis.shape[1] for basis in bases]
            rows = self.x.new_zeros(len(bases), max(widths), self.x.shape[1])
            for row, width, basis in zip(rows, widths, bases, strict=True):
                row[:width].copy_(basis.mT)
            self.basis = rows.mT
            restrictions = [basis[:, :width] for basis, width in zip(rows.mT, widths, strict=True)]
        self.bases = restrictions
        values = gather([parameter.detach() for parameter in parameters])
        gradients = torch.zeros_like(values)
        self.values, self.gradients = self._tall(values), self._tall(gradients)
        self._value_rows, self._gradient_rows = list(values.unbind()), list(gradients.unbind())
        # bf16 cannot hold a master, and a small increment on top of one would be lost to rounding: such a parameter
        # goes through the optimizer's step as zero instead
        self.lends_masters = values.dtype == self.x.dtype
        atol = 100 * torch.finfo(self.x.dtype).eps
        self.exact_bases = all(basis is None or maps.check_factor(basis, atol=atol) for basis in restrictions)
        self.on_manifold = list(map(partial(maps.check_factor, atol=atol), self.x, restrictions))
        self.scales = []
        if s is not None:
            self.s, self.scaling = self.x.new_tensor(s), self.x.new_tensor(scaling)
            self.s_gradients = torch.zeros_like(self.s)
            self.scales = [nn.Parameter(row) for row in self.s.split(1)]

    def ratios(self, rows: slice) -> torch.Tensor:
        """s/γ of some layers, `(k, 1, 1)`."""
        return (self.s[rows] / self.scaling[rows])[:, None, None]

    def basis_of(self, rows: slice) -> torch.Tensor | None:
        return None if self.basis is None else self.basis[rows]

    def _tall(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.mT if self.is_v else rows

    def hold(self) -> None:
        """
        Makes the parameters' data slices of `values`, also where something has since given them other memory.

        Raises:
            RuntimeError: if a parameter has changed its dtype or device.
        """
        for row, parameter in zip(self._value_rows, self.parameters, strict=True):
            if parameter.data_ptr() == row.data_ptr():
                continue
            if (parameter.dtype, parameter.device) != (row.dtype, row.device):
                raise RuntimeError(
                    f"A LoRA parameter became {parameter.dtype} on {parameter.device} in the middle of training; it "
                    f"was {row.dtype} on {row.device}. Convert or move the model before it is trained."
                )
            row.copy_(parameter)
            parameter.data = row

    def release(self) -> None:
        """Gives every parameter memory of its own again."""
        for row, parameter in zip(self._value_rows, self.parameters, strict=True):
            if parameter.data_ptr() == row.data_ptr():
                parameter.data = row.clone()

    def gradients_of(self, rows: slice) -> list[torch.Tensor]:
        """The gradients of some parameters that have one, as [`active`] gives them."""
        return [parameter.grad for parameter in self.parameters[rows] if parameter.grad is not None]

    def take_gradients(self, rows: slice) -> torch.Tensor:
        """Moves the gradients of some parameters into `gradients` and returns that slice of it."""
        targets = self._gradient_rows[rows]
        sources = self.gradients_of(rows)
        # after zero_grad(set_to_none=False) backward has accumulated in our own memory
        moved = [i for i, source in enumerate(sources) if source is not targets[i]]
        if moved:
            torch._foreach_copy_([targets[i] for i in moved], [sources[i] for i in moved])
        for parameter, target in zip(self.parameters[rows], targets, strict=True):
            parameter.grad = target
        return self.gradients[rows]

    def give_gradients(self, rows: slice) -> None:
        """Passes what is in `gradients` on to the parameters; here it is the same memory."""

    def take_values(self, rows: slice) -> torch.Tensor:
        """Brings the parameters into `values` and returns that slice of it; here it is the same memory."""
        return self.values[rows]

    def give_values(self, rows: slice) -> None:
        """Passes what is in `values` on to the parameters; here it is the same memory."""

    def active(self) -> list[slice]:
        """The runs of factors whose parameter has a gradient; on a CPU each is short enough to stay in its cache."""
        longest = len(self.parameters)
        if self.x.device.type == "cpu":
            longest = max(_CACHE // (self.x[0].numel() * self.x.element_size()), 1)
        runs, start = [], None
        for i, parameter in enumerate([*self.parameters, None]):
            if start is not None and (parameter is None or parameter.grad is None or i - start == longest):
                runs.append(slice(start, i))
                start = None
            if start is None and parameter is not None and parameter.grad is not None:
                start = i
        return runs


def of_similar_width(bases: list[torch.Tensor | None]) -> list[list[int]]:
    """Groups the indices of bases `(d, p)` so that none is padded much when a group is stacked."""
    widths = [0 if basis is None else basis.shape[1] for basis in bases]
    groups: list[list[int]] = []
    for index in sorted(range(len(widths)), key=lambda index: -widths[index]):
        if groups and widths[groups[-1][0]] <= _PADDED * widths[index]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
