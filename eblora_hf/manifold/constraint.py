"""Keeps LoRA factors on the Stiefel manifold through every step of any torch optimizer.

The model holds stock LoRA: A = Vᵀ and B = (s/γ) U, so ΔW = γ B A = s U Vᵀ with s the singular value of the update,
whatever `lora_alpha` is. The constraint owns U, V and s in float32. Around each step of the optimizer it

1. turns dL/dB and dL/dA into dL/dU = (s/γ) dL/dB, dL/dV = (dL/dA)ᵀ, dL/ds = <dL/dB, U>/γ, and the first two into
   tangent vectors, which become the gradients the optimizer sees;
2. lends the optimizer the parameters as U and Vᵀ and reads its increment Δ from them;
3. projects the increment on the tangent space, retracts, steps s with its own AdamW, and writes A and B back.

Projecting the gradient alone would not do: an optimizer that rescales element by element leaves the tangent space.
"""

import torch
from torch import nn

from ..adapters.factors import Factors, check_state
from ..adapters.layers import AdaptedLayer
from ..adapters.sharding import is_sharded
from . import inplace, maps
from .optimizers import ParameterGroups, entry_size
from .penalty import KroneckerPenalty
from .sharded_stack import ShardedStack
from .stack import FactorStack, of_similar_width
from .step_hooks import StepHooks

_LARGEST_GRAM = 1e4  # of X + δ where nobody looks: a step δ a hundred times as large as a factor is divergence


class StiefelConstraint(StepHooks):
    """
    Keeps LoRA factors on the Stiefel manifold through every step of `optimizer`.

    Args:
        optimizer (`torch.optim.Optimizer`): Any optimizer whose `step` needs no closure, holding all LoRA factors.
        layers (`list[AdaptedLayer]`): The layers to constrain.
        factors (`dict[str, Factors]`): Per layer name the factors to start from; they are written into the model.
        bases (`dict[str, torch.Tensor]`, *optional*): Per layer name an orthonormal basis `(d_in, p)` that V must
            avoid.
        step_scaling (`str`, defaults to `"dimensionless"`): How an increment Δ of the optimizer becomes a step of U or
            V of height d. `"dimensionless"`: `direction_lr`/√d · Δ/(lr·e), with lr the optimizer's learning rate
            before its schedule and e the size of its entries ([`entry_size`], 1 for Adam), if that is known, else Δ.
            `"rank"`: √(`step_constant`/r) Δ (the released code). `"rows"`: √(`step_constant`/d) Δ (StelLA). `"none"`:
            Δ.
        step_constant (`float`, defaults to 4096): c of the released scalings.
        tangent (`str`, defaults to `"canonical"`): `"canonical"` for the released map, `"orthogonal"` for the
            projection.
        scale_betas, scale_eps, scale_weight_decay: Hyper-parameters of the AdamW that trains s.
        penalty ([`KroneckerPenalty`], *optional*): Its gradient is added to that of the loss, after clipping.

    Attributes:
        direction_lr (`float`): Step of U and V under the dimensionless scaling.
        scale_lr (`float`): Learning rate of s, multiplied by the optimizer's schedule.

    Raises:
        ValueError: if `p + r > d_in` or `r > d_out` for a layer, if a factor is missing from the optimizer, or if the
            optimizer is of a kind that no constraint can follow.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        layers: list[AdaptedLayer],
        factors: dict[str, Factors],
        bases: dict[str, torch.Tensor] | None = None,
        *,
        direction_lr: float,
        scale_lr: float,
        step_scaling: str = "dimensionless",
        step_constant: float = 4096.0,
        tangent: str = "canonical",
        scale_betas: tuple[float, float] = (0.9, 0.999),
        scale_eps: float = 1e-8,
        scale_weight_decay: float = 0.0,
        penalty: KroneckerPenalty | None = None,
    ):
        super().__init__(optimizer)
        self.groups = ParameterGroups(self.optimizer)
        self.layers = layers
        self.direction_lr, self.scale_lr = direction_lr, scale_lr
        self.step_scaling, self.step_constant = step_scaling, float(step_constant)
        self.tangent, self.penalty = tangent, penalty
        self._check(factors, bases or {})
        self._stacks = self._stack(factors, bases or {})
        scales = {index: s for stack in self._stacks for index, s in zip(stack.layers, stack.scales, strict=False)}
        self.scales = [scales[index] for index in range(len(layers))]
        self._left, self._right = self._masters()
        self._batches: list[list[tuple[FactorStack, slice]]] = []
        self._scale_optimizer = torch.optim.AdamW(
            self._scale_groups(),
            lr=scale_lr,
            betas=scale_betas,
            eps=scale_eps,
            weight_decay=scale_weight_decay,
            fused=all(scale.device.type in ("cpu", "cuda") for scale in self.scales),
        )
        self.attach()
        self.write()

    def detach(self) -> None:
        super().detach()
        for stack in self._stacks:
            stack.release()

    def _check(self, factors: dict[str, Factors], bases: dict[str, torch.Tensor]) -> None:
        for layer in self.layers:
            basis = bases.get(layer.name)
            p = 0 if basis is None else basis.shape[1]
            maps.check_feasible(layer.d_out, layer.rank, name=f"{layer.name} (U)")
            maps.check_feasible(layer.d_in, layer.rank, p, name=f"{layer.name} (V)")
            if layer.name not in factors:
                raise ValueError(f"No factors were given for the layer {layer.name}.")
            for parameter, kind in ((layer.lora_A, "lora_A"), (layer.lora_B, "lora_B")):
                if parameter not in self.groups:
                    raise ValueError(
                        f"The optimizer does not hold {kind} of {layer.name}, so it would not train. Build it from "
                        "the parameters of the model with its adapter, or pass `optimizer_cls_and_kwargs` instead."
                    )
                self.groups.base_lr(self.groups.index(parameter))

    def _stack(self, factors: dict[str, Factors], bases: dict[str, torch.Tensor]) -> list[FactorStack]:
        """Stacks what has one shape, dtype, device and step; V by bases of about one width, which are padded."""
        alike: dict[tuple, list] = {}
        for index, layer in enumerate(self.layers):
            dtype = _master_dtype(layer)
            basis = bases.get(layer.name)
            basis = None if basis is None or basis.shape[1] == 0 else basis
            u, v = factors[layer.name].U, factors[layer.name].V
            for is_v, x, parameter, restriction in ((False, u, layer.lora_B, None), (True, v, layer.lora_A, basis)):
                step_factor = self._step_factor(parameter, *x.shape)
                key = (is_v, x.shape, parameter.dtype, parameter.device, step_factor)
                master = x.detach().to(parameter.device, dtype)
                alike.setdefault(key, []).append((master, restriction, parameter, index))
        stacks = []
        for (is_v, *_, step_factor), members in alike.items():
            for group in of_similar_width([restriction for _, restriction, _, _ in members]):
                masters, restrictions, parameters, indices = map(list, zip(*(members[i] for i in group), strict=True))
                s = None if is_v else [factors[self.layers[index].name].s for index in indices]
                scaling = None if is_v else [self.layers[index].scaling for index in indices]
                bases_or_none = None if restrictions[0] is None else restrictions
                kind = ShardedStack if is_sharded(parameters[0]) else FactorStack
                stacks.append(kind(masters, bases_or_none, parameters, indices, is_v, step_factor, s, scaling))
        return stacks

    def _scale_groups(self) -> list[dict]:
        """One group of s per group of the optimizer, whose schedule it follows."""
        groups: dict[int, list[nn.Parameter]] = {}
        for layer, scale in zip(self.layers, self.scales, strict=True):
            groups.setdefault(self.groups.index(layer.lora_B), []).append(scale)
        return [{"params": scales, "followed": index} for index, scales in groups.items()]

    # ---- one step of the optimizer ----

    def before_step(self) -> None:
        """Turns gradients into tangent vectors and lends the optimizer the factors."""
        self._batches = self._find_batches()
        with maps.full_precision():
            for stack, rows in (run for batch in self._batches for run in batch):
                self._lend(stack, rows)

    def _find_batches(self) -> list[list[tuple[FactorStack, slice]]]:
        """
        The runs of factors that are moved together: one by one on a CPU, whose cache holds about one; all of one rank
        on other devices, where a decomposition of many matrices takes no longer than that of a few.
        """
        batches: dict[tuple, list] = {}
        for number, stack in enumerate(self._stacks):
            stack.hold()
            alone = stack.x.device.type == "cpu"
            for rows in stack.active():
                key = (number, rows.start) if alone else (stack.x.device, stack.x.dtype, stack.x.shape[-1])
                batches.setdefault(key, []).append((stack, rows))
        return list(batches.values())

    def _lend(self, stack: FactorStack, rows: slice) -> None:
        """Gives the optimizer tangent gradients, and the factors themselves as parameters."""
        x, values, gradients = stack.x[rows], stack.values[rows], stack.take_gradients(rows)
        z = gradients.to(x.dtype)  # the same memory where it is the same dtype
        if self.penalty is not None:
            self._add_penalty(self.penalty, stack, rows, z)
        inner = inplace.tangent_(z, x, stack.basis_of(rows), self.tangent)
        if not stack.is_v:
            self.apply_chain_rule(stack, rows, z, inner)
        if not stack.lends_masters:
            gradients.copy_(z)
            values.zero_()
        elif not stack.is_v:  # lora_A holds V as it is
            values.copy_(x)
        stack.give_gradients(rows)
        stack.give_values(rows)

    def _add_penalty(self, penalty: KroneckerPenalty, stack: FactorStack, rows: slice, z: torch.Tensor) -> None:
        """Adds its gradient in B or V to that of the loss; B is (s/γ) U."""
        for index, gradient in zip(stack.layers[rows], z, strict=True):
            u, v, s, layer = self._left[index], self._right[index], self.scales[index], self.layers[index]
            scale = self.gradient_scale * (1.0 if stack.is_v else layer.scaling)
            penalty.add_slope(gradient, layer.name, u, v, s, of_v=stack.is_v, scale=scale)

    def apply_chain_rule(self, stack: FactorStack, rows: slice, z: torch.Tensor, inner: torch.Tensor) -> None:
        """
        Turns the tangent part of dL/dB into that of dL/dU, in place, and sets the gradients of s.

        Args:
            stack, rows: Which layers.
            z (`torch.Tensor` of shape `(k, d, r)`): Tangent part of dL/dB.
            inner (`torch.Tensor` of shape `(k, r, r)`): Uᵀ dL/dB, whose trace is <dL/dB, U>.
        """
        slope = inner.diagonal(dim1=-2, dim2=-1).sum(dim=-1) / stack.scaling[rows]  # dL/ds, (k,)
        torch.div(slope, self.gradient_scale, out=stack.s_gradients[rows])
        for scale, gradient in zip(stack.scales[rows], stack.s_gradients[rows].split(1), strict=True):
            scale.grad = gradient
        z.mul_(stack.ratios(rows))

    def after_step(self) -> None:
        """Steps s, and takes the increments back onto the manifold."""
        for group in self._scale_optimizer.param_groups:
            group["lr"] = self.scale_lr * self.groups.schedule(group["followed"])
        self._scale_optimizer.step()
        self._scale_optimizer.zero_grad()
        with maps.full_precision():
            for batch in self._batches:
                self._take_back(batch)
        self._batches = []

    def _take_back(self, batch: list[tuple[FactorStack, slice]]) -> None:
        """Projects the increments the optimizer made and retracts."""
        moved, grams = [], []
        for stack, rows in batch:
            x, y = stack.x[rows], stack.take_values(rows).to(stack.x.dtype)  # the same memory, if of that dtype
            basis = stack.basis_of(rows)
            if stack.lends_masters:
                y.sub_(x)
            if stack.exact_bases and all(stack.on_manifold[rows]):
                grams.append(inplace.move_(y, x, basis, self.tangent, stack.step_factor))
            else:  # the maps as they are defined
                tangents = {"canonical": maps.canonical_tangent, "orthogonal": maps.orthogonal_tangent}
                delta = tangents[self.tangent](x, stack.step_factor * y, basis)
                y.copy_(maps.polar_retraction(x, delta, basis))
                grams.append(y.mT @ y)
            moved.append(y)
        # a CPU looks how far the steps went; elsewhere that would be waiting for the device
        largest = None if batch[0][0].x.device.type == "cpu" else _LARGEST_GRAM
        roots = inplace.inverse_root(torch.cat(grams), largest).split([len(y) for y in moved])
        for (stack, rows), y, root in zip(batch, moved, roots, strict=True):
            inplace.retract_(stack.x[rows], y, root)
            stack.on_manifold[rows] = [True] * len(y)
            self._write(stack, rows)

    def _step_factor(self, parameter: nn.Parameter, d: int, r: int) -> float:
        """κ, by which an increment of the optimizer is multiplied."""
        if self.step_scaling == "rank":
            return (self.step_constant / r) ** 0.5
        if self.step_scaling == "rows":
            return (self.step_constant / d) ** 0.5
        index = self.groups.index(parameter)
        entry = entry_size(self.optimizer, self.optimizer.param_groups[index], *parameter.shape)
        if self.step_scaling == "dimensionless" and entry is not None:
            return self.direction_lr / (d**0.5 * self.groups.base_lr(index) * entry)
        return 1.0

    @torch.no_grad()
    def write(self) -> None:
        """Writes A = Vᵀ and B = (s/γ) U into the model."""
        for stack in self._stacks:
            stack.hold()
            self._write(stack, slice(0, len(stack.layers)))

    def _write(self, stack: FactorStack, rows: slice) -> None:
        x, values = stack.x[rows], stack.values[rows]
        if stack.is_v:
            values.copy_(x)
        elif stack.lends_masters:
            torch.mul(x, stack.ratios(rows), out=values)
        else:
            values.copy_(x * stack.ratios(rows))
        stack.give_values(rows)

    # ---- state ----

    @property
    def rates(self) -> dict[str, float]:
        return {"direction_lr": self.direction_lr, "scale_lr": self.scale_lr}

    def factors(self) -> dict[str, Factors]:
        """The current factors by layer name; U and V are views of the masters."""
        return {
            layer.name: Factors(self._left[index], self._right[index], self.scales[index].item())
            for index, layer in enumerate(self.layers)
        }

    def _masters(self) -> list[dict[int, torch.Tensor]]:
        """Views of all U and of all V, by the number of the layer."""
        sides = ([stack for stack in self._stacks if stack.is_v is side] for side in (False, True))
        return [{i: x for stack in side for i, x in zip(stack.layers, stack.x, strict=True)} for side in sides]

    @property
    def bases(self) -> dict[str, torch.Tensor]:
        return {
            self.layers[index].name: basis
            for stack in self._stacks
            for index, basis in zip(stack.layers, stack.bases, strict=True)
            if basis is not None
        }

    def deviation(self) -> tuple[float, float]:
        """The largest entries of |XᵀX - I| and |FᵀX| over all factors."""
        pairs = [maps.factor_deviation(stack.x, stack.basis) for stack in self._stacks]
        return max(orthonormality for orthonormality, _ in pairs), max(restriction for _, restriction in pairs)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """
        What a checkpoint needs beside the adapter and the optimizer: U, V, s and the moments of s, by layer name.
        """
        state: dict[str, torch.Tensor] = {}
        for (name, factors), scale in zip(self.factors().items(), self.scales, strict=True):
            state |= {f"{name}.U": factors.U, f"{name}.V": factors.V, f"{name}.s": scale.detach()}
            state |= {f"{name}.s.{key}": value for key, value in self._scale_optimizer.state[scale].items()}
        return {key: value.clone() for key, value in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """
        Restores a `state_dict` and writes its factors into the model.

        Raises:
            ValueError: if the state is of other layers or shapes.
        """
        check_state(state, self.layers)
        for name, factors in self.factors().items():
            factors.U.copy_(state[f"{name}.U"])
            factors.V.copy_(state[f"{name}.V"])
        moments = {}
        for index, (layer, scale) in enumerate(zip(self.layers, self.scales, strict=True)):
            scale.copy_(state[f"{layer.name}.s"])
            prefix = f"{layer.name}.s."
            moments[index] = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        current = self._scale_optimizer.state_dict()  # numbers the scales group by group
        numbered = [scale for group in self._scale_optimizer.param_groups for scale in group["params"]]
        position = {id(scale): index for index, scale in enumerate(self.scales)}
        restored = {number: moments[position[id(scale)]] for number, scale in enumerate(numbered)}
        current["state"] = {number: state for number, state in restored.items() if state}
        self._scale_optimizer.load_state_dict(current)
        self.write()


def _master_dtype(layer: AdaptedLayer) -> torch.dtype:
    """float32, or the parameter's own dtype where that is wider."""
    return torch.promote_types(layer.lora_B.dtype, torch.float32)
