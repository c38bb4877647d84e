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

from . import stiefel
from .factors import Factors, FactorStack, check_state
from .layers import AdaptedLayer
from .optimizers import ParameterGroups, is_normalised
from .step_hooks import StepHooks


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
            V of height d. `"dimensionless"`: `direction_lr`/√d · Δ/lr, with lr the optimizer's learning rate before
            its schedule, if the optimizer normalises element-wise, else Δ. `"rank"`: √(`step_constant`/r) Δ (the
            released code). `"rows"`: √(`step_constant`/d) Δ (StelLA). `"none"`: Δ.
        step_constant (`float`, defaults to 4096): c of the released scalings.
        tangent (`str`, defaults to `"canonical"`): `"canonical"` for the released map, `"orthogonal"` for the
            projection.
        scale_betas, scale_eps, scale_weight_decay: Hyper-parameters of the AdamW that trains s.

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
    ):
        super().__init__(optimizer)
        self.groups = ParameterGroups(self.optimizer)
        self.layers = layers
        self.direction_lr, self.scale_lr = direction_lr, scale_lr
        self.step_scaling, self.step_constant = step_scaling, float(step_constant)
        self._tangent = stiefel.canonical_tangent if tangent == "canonical" else stiefel.orthogonal_tangent
        self._normalised = is_normalised(self.optimizer)
        self._check(factors, bases or {})
        self._stacks = self._stack(factors, bases or {})
        self.scales = [
            nn.Parameter(torch.tensor([factors[layer.name].s], dtype=_master_dtype(layer), device=layer.lora_B.device))
            for layer in layers
        ]
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

    def _check(self, factors: dict[str, Factors], bases: dict[str, torch.Tensor]) -> None:
        for layer in self.layers:
            basis = bases.get(layer.name)
            p = 0 if basis is None else basis.shape[1]
            stiefel.check_feasible(layer.d_out, layer.rank, name=f"{layer.name} (U)")
            stiefel.check_feasible(layer.d_in, layer.rank, p, name=f"{layer.name} (V)")
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
        rows: dict[tuple, list] = {}
        for index, layer in enumerate(self.layers):
            dtype = _master_dtype(layer)
            basis = bases.get(layer.name)
            basis = None if basis is None or basis.shape[1] == 0 else basis.to(layer.lora_A.device, dtype)
            u, v = factors[layer.name].U, factors[layer.name].V
            for is_v, x, parameter, restriction in ((False, u, layer.lora_B, None), (True, v, layer.lora_A, basis)):
                width = 0 if restriction is None else restriction.shape[1]
                key = (is_v, x.shape, width, parameter.dtype, parameter.device)
                master = x.detach().to(parameter.device, dtype)
                rows.setdefault(key, []).append((master, restriction, parameter, index))
        stacks = []
        for (is_v, _, width, _, _), members in rows.items():
            masters, restrictions, parameters, indices = map(list, zip(*members, strict=True))
            stacks.append(FactorStack(masters, restrictions if width else None, parameters, indices, is_v))
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
        with stiefel.full_precision():
            for stack in self._stacks:
                stack.active = [i for i, parameter in enumerate(stack.parameters) if parameter.grad is not None]
                if stack.active:
                    self._lend(stack, self.euclidean_gradients(stack))
        for scale in self.scales:
            if scale.grad is not None:
                scale.grad.div_(self.gradient_scale)

    def euclidean_gradients(self, stack: FactorStack) -> torch.Tensor:
        """
        dL/dU or dL/dV of the active factors of a stack, `(k, d, r)`. Along with dL/dU it sets the gradients of s.
        """
        gradients = stack.tall([stack.parameters[i].grad for i in stack.active])
        if stack.is_v:
            return gradients
        layers = [stack.layers[i] for i in stack.active]
        inner = (stack.of_active(stack.x) * gradients).sum(dim=(-2, -1))  # <dL/dB, U>, (k,)
        ratios = self._scale_ratios(layers)  # s/γ
        for layer, product in zip(layers, inner, strict=True):
            self.scales[layer].grad = (product / self.layers[layer].scaling).reshape(1)
        return gradients * ratios

    def _scale_ratios(self, layers: list[int]) -> torch.Tensor:
        """s/γ of some layers, `(k, 1, 1)`."""
        return torch.stack([self.scales[layer] / self.layers[layer].scaling for layer in layers]).unsqueeze(-1)

    def _lend(self, stack: FactorStack, gradients: torch.Tensor) -> None:
        """Gives the optimizer tangent gradients, and the factors themselves as parameters."""
        x = stack.of_active(stack.x)
        tangents = stack.like_parameter(self._tangent(x, gradients, stack.of_active(stack.basis)))
        for row, i in enumerate(stack.active):
            parameter = stack.parameters[i]
            parameter.grad.copy_(tangents[row])
            if stack.lends_masters:
                parameter.copy_(stack.like_parameter(x[row]))
            else:
                parameter.zero_()

    def after_step(self) -> None:
        """Takes the increments back onto the manifold, and steps s."""
        with stiefel.full_precision():
            for stack in self._stacks:
                if stack.active:
                    self._take_back(stack)
        for group in self._scale_optimizer.param_groups:
            group["lr"] = self.scale_lr * self.groups.schedule(group["followed"])
        self._scale_optimizer.step()
        self._scale_optimizer.zero_grad()
        self.write()

    def _take_back(self, stack: FactorStack) -> None:
        """Projects the increments the optimizer made and retracts."""
        x, basis = stack.of_active(stack.x), stack.of_active(stack.basis)
        parameters = [stack.parameters[i] for i in stack.active]
        increments = stack.tall(parameters)
        if stack.lends_masters:
            increments = increments - x
        steps = [self._step_factor(parameter, *x.shape[-2:]) for parameter in parameters]
        increments = increments * x.new_tensor(steps).reshape(-1, 1, 1)
        stack.x[stack.active] = stiefel.polar_retraction(x, self._tangent(x, increments, basis), basis)

    def _step_factor(self, parameter: nn.Parameter, d: int, r: int) -> float:
        if self.step_scaling == "rank":
            return (self.step_constant / r) ** 0.5
        if self.step_scaling == "rows":
            return (self.step_constant / d) ** 0.5
        if self.step_scaling == "dimensionless" and self._normalised:
            return self.direction_lr / (d**0.5 * self.groups.base_lr(self.groups.index(parameter)))
        return 1.0

    @torch.no_grad()
    def write(self) -> None:
        """Writes A = Vᵀ and B = (s/γ) U into the model."""
        for stack in self._stacks:
            x = stack.x if stack.is_v else stack.x * self._scale_ratios(stack.layers)
            for row, parameter in zip(stack.like_parameter(x), stack.parameters, strict=True):
                parameter.copy_(row)

    # ---- state ----

    @property
    def rates(self) -> dict[str, float]:
        return {"direction_lr": self.direction_lr, "scale_lr": self.scale_lr}

    def factors(self) -> dict[str, Factors]:
        """The current factors by layer name; U and V are views of the masters."""
        u, v = {}, {}
        for stack in self._stacks:
            (v if stack.is_v else u).update(zip(stack.layers, stack.x, strict=True))
        return {
            layer.name: Factors(u[index], v[index], self.scales[index].item())
            for index, layer in enumerate(self.layers)
        }

    def deviation(self) -> tuple[float, float]:
        """The largest entries of |XᵀX - I| and |FᵀX| over all factors."""
        pairs = [stiefel.factor_deviation(stack.x, stack.basis) for stack in self._stacks]
        return max(orthonormality for orthonormality, _ in pairs), max(restriction for _, restriction in pairs)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """
        What a checkpoint needs beside the adapter and the optimizer: U, V, s and the moments of s, by layer name.
        """
        state = {}
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
