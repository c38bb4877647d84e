"""The penalty for changing what earlier tasks react to, against its definition in float64."""

import itertools

import pytest
import torch
from torch import nn

from eblora_hf.adapters.factors import Factors
from eblora_hf.adapters.layers import find_layers
from eblora_hf.manifold.constraint import StiefelConstraint
from eblora_hf.manifold.penalty import Curvature, KroneckerPenalty, join_curvatures

from ..support.tiny import lora, make_model, orthonormal


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(curvature: Curvature, delta: torch.Tensor) -> torch.Tensor:
    """½ tr(ΔWᵀ O ΔW C) from the whole matrices."""
    o, c = curvature.outputs @ curvature.outputs.mT, curvature.inputs @ curvature.inputs.mT
    return (delta.mT @ o @ delta @ c).trace() / 2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_slopes_are_those_of_the_quadratic_form(seed):
    curvature = Curvature(random(9, 5, seed=seed), random(7, 4, seed=seed + 10))
    penalty = KroneckerPenalty({"layer": curvature}, 3.0)
    u, v = random(7, 2, seed=seed + 20), random(9, 2, seed=seed + 30)
    s = torch.tensor(-0.3, dtype=torch.float64)
    left, right = (s * u).requires_grad_(True), v.clone().requires_grad_(True)
    (3.0 * value(curvature, left @ right.mT)).backward()
    of_u, of_v = torch.ones_like(u), torch.ones_like(v)
    penalty.add_slope(of_u, "layer", u, v, s, of_v=False, scale=1.0)
    penalty.add_slope(of_v, "layer", u, v, s, of_v=True, scale=1.0)
    torch.testing.assert_close(of_u - 1, left.grad, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(of_v - 1, right.grad, atol=1e-12, rtol=1e-12)
    unknown = torch.zeros_like(u)
    penalty.add_slope(unknown, "another", u, v, s, of_v=False, scale=1.0)
    assert not unknown.any()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_steps_of_any_optimizer_go_down_its_slope_on_the_manifold(optimizer):
    """The loss is zero, so that only the penalty moves anything; γ is 2."""
    from peft import get_peft_model

    model = get_peft_model(make_model("llama", dtype=torch.float64), lora())
    layers = find_layers(model, "default")
    factors, curvatures, bases = {}, {}, {}
    for number, layer in enumerate(layers):
        bases[layer.name] = orthonormal(layer.d_in, 3, seed=number)
        v = orthonormal(layer.d_in, 7, seed=number)[:, 3:]  # QR: the first columns are those of the basis
        factors[layer.name] = Factors(orthonormal(layer.d_out, 4, seed=number + 50), v, -0.5)
        curvatures[layer.name] = Curvature(
            random(layer.d_in, 6, seed=number + 100), random(layer.d_out, 6, seed=number + 150)
        )
    trained = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
    stepped = optimizer(trained, lr=1e-3)
    penalty = KroneckerPenalty(curvatures, 1.0)
    constraint = StiefelConstraint(
        stepped,
        layers,
        factors,
        bases,
        direction_lr=0.05,
        scale_lr=1e-3,
        tangent="orthogonal",
        step_scaling="none" if optimizer is torch.optim.SGD else "dimensionless",
        penalty=penalty,
    )

    def total() -> float:
        return sum(value(curvatures[name], x.s * x.U @ x.V.mT).item() for name, x in constraint.factors().items())

    values = [total()]
    for _ in range(20):
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        stepped.step()
        values.append(total())
    assert all(after < before for before, after in itertools.pairwise(values))
    assert values[-1] < 0.95 * values[0]
    assert max(constraint.deviation()) < 1e-10


def test_the_slope_in_b_has_the_scaling_of_peft():
    """The gradients of U, V and s after the chain rule through B = (s/γ) U, against autograd."""

    class Layer:
        name, scaling = "layer", 2.0
        d_in, d_out, rank = 9, 7, 2
        weight = torch.zeros(7, 9, dtype=torch.float64)

    layer = Layer()
    layer.lora_A = nn.Parameter(torch.zeros(2, 9, dtype=torch.float64))
    layer.lora_B = nn.Parameter(torch.zeros(7, 2, dtype=torch.float64))
    stepped = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=1e-9)
    curvature = Curvature(random(9, 4, seed=1), random(7, 4, seed=2))
    factors = Factors(orthonormal(7, 2, seed=3), orthonormal(9, 2, seed=4), -0.5)
    constraint = StiefelConstraint(
        stepped,
        [layer],
        {"layer": factors},
        direction_lr=1.0,
        scale_lr=1.0,
        step_scaling="none",
        tangent="orthogonal",
        penalty=KroneckerPenalty({"layer": curvature}, 1.0),
    )
    layer.lora_A.grad, layer.lora_B.grad = torch.zeros_like(layer.lora_A), torch.zeros_like(layer.lora_B)
    seen = {}
    stepped.register_step_pre_hook(lambda *_: seen.update(A=layer.lora_A.grad.clone(), B=layer.lora_B.grad.clone()))
    scale = constraint.scales[0].item()
    stepped.step()
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    value(curvature, s * factors.U @ factors.V.mT).backward()
    # AdamW's first step goes against the sign of dP/ds by the whole rate
    assert constraint.scales[0].item() == pytest.approx(scale - torch.sign(s.grad).item(), abs=1e-6)
    # what the optimizer sees are the tangent parts of dP/dU and dP/dV
    u, v = factors.U.clone().requires_grad_(True), factors.V.clone().requires_grad_(True)
    value(curvature, scale * u @ v.mT).backward()
    for slope, x, shown in ((u.grad, factors.U, seen["B"]), (v.grad, factors.V, seen["A"].mT)):
        inner = x.mT @ slope
        expected = slope - x @ (inner + inner.mT) / 2
        torch.testing.assert_close(shown, expected, atol=1e-12, rtol=1e-9)


def test_of_several_tasks_outputs_are_summed_and_inputs_averaged():
    tasks = [Curvature(random(9, 3, seed=i).float(), random(7, 2, seed=i + 10).float()) for i in range(3)]
    joined = join_curvatures(tasks)
    o = sum(task.outputs @ task.outputs.mT for task in tasks)
    c = sum(task.inputs @ task.inputs.mT for task in tasks) / 3
    torch.testing.assert_close(joined.outputs @ joined.outputs.mT, o)
    torch.testing.assert_close(joined.inputs @ joined.inputs.mT, c)
    assert joined.inputs.shape == (9, 9)


def test_of_many_columns_those_of_the_largest_energy_are_kept():
    """300 tasks with a direction each, as long as their number: the last 256 are kept."""
    tasks = [Curvature(torch.eye(400)[:, i : i + 1] * i, torch.eye(400)[:, i : i + 1] * i) for i in range(1, 301)]
    joined = join_curvatures(tasks)
    assert joined.outputs.shape == (400, 256)
    energies = (joined.outputs @ joined.outputs.mT).diagonal()
    torch.testing.assert_close(energies[45:301], torch.arange(45, 301).float().square(), rtol=1e-4, atol=1e-2)
    assert energies[:45].abs().max() < 1e-2
