"""The constraint under real optimizers on a real PEFT model."""

import copy
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers.optimization import Adafactor

from eblora_hf.adapters.factors import Factors, factors_from_state, load_state, save_state
from eblora_hf.adapters.layers import find_layers
from eblora_hf.manifold import maps
from eblora_hf.manifold import stack as factor_stack
from eblora_hf.manifold.constraint import StiefelConstraint

from ..support.factors import backward, setting
from ..support.tiny import lora, make_model, make_text_data, orthonormal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "adamw_fused", "sgd_momentum", "adafactor"])
def test_constraints_hold_after_every_one_of_300_steps(name, dtype):
    model, layers, optimizer, constraint = setting(name, dtype=dtype)
    start = {key: value for key, value in constraint.state_dict().items() if key.endswith((".U", ".V", ".s"))}
    farthest = dict.fromkeys(start, 0.0)  # a scale may end where it began
    for step in range(300):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        orthonormality, restriction = constraint.deviation()
        assert orthonormality <= 2e-6, step
        assert restriction <= 2e-7, step
        if step % 10 == 9:
            now = constraint.state_dict()
            farthest = {key: max(farthest[key], (now[key] - start[key]).abs().max().item()) for key in start}
    least = 1e-5 if name == "sgd_momentum" else 1e-3  # SGD's steps are as small as the gradients of queries and keys
    assert len(farthest) == 3 * len(layers)
    assert min(farthest.values()) > least  # every factor has been trained
    for layer in layers:  # what the model holds is what the constraint holds, to the resolution of its dtype
        factors = constraint.factors()[layer.name]
        delta = factors.s * factors.U @ factors.V.T
        actual = layer.scaling * layer.lora_B.float() @ layer.lora_A.float()
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        assert (actual - delta).abs().max() <= tolerance * max(delta.abs().max().item(), 1e-3)


@pytest.mark.parametrize("name", ["adamw_foreach", "rmsprop", "adagrad"])
@pytest.mark.parametrize("tangent", ["canonical", "orthogonal"])
def test_other_optimizers_and_both_tangent_maps(name, tangent):
    model, _, optimizer, constraint = setting(name, tangent=tangent)
    for step in range(20):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert max(constraint.deviation()) <= 2e-6


def test_one_sgd_step_against_the_formulas():
    """SGD without momentum: U⁺ = polar(U - η K_U(dL/dU)), and likewise V outside F; independent of the hooks' code."""
    model, layers, optimizer, constraint = setting(lambda p: torch.optim.SGD(p, lr=0.7))
    backward(model, 0)
    expected = {}
    for layer in layers:
        factors, basis = constraint.factors()[layer.name], orthonormal_basis(constraint, layer)
        u, v, s = factors.U.double(), factors.V.double(), factors.s
        g_u = s / layer.scaling * layer.lora_B.grad.double()
        g_v = layer.lora_A.grad.double().T
        outside = torch.eye(layer.d_in, dtype=torch.float64) - basis @ basis.T
        k_u = g_u - u @ g_u.T @ u
        k_v = outside @ g_v - v @ (outside @ g_v).T @ v
        # the increment is -η K(g); the released map is applied to it once more
        d_u, d_v = -0.7 * k_u, -0.7 * k_v
        d_u, d_v = d_u - u @ d_u.T @ u, d_v - v @ d_v.T @ v
        expected[layer.name] = [
            left @ right
            for left, _, right in (torch.linalg.svd(y, full_matrices=False) for y in (u + d_u, outside @ (v + d_v)))
        ]
    optimizer.step()
    for layer in layers:
        factors = constraint.factors()[layer.name]
        torch.testing.assert_close(factors.U.double(), expected[layer.name][0], atol=1e-6, rtol=0)
        torch.testing.assert_close(factors.V.double(), expected[layer.name][1], atol=1e-6, rtol=0)


def orthonormal_basis(constraint, layer):
    index = constraint.layers.index(layer)
    stack = next(stack for stack in constraint._stacks if stack.is_v and index in stack.layers)
    return stack.basis[stack.layers.index(index)].double()


@pytest.mark.parametrize("lr", [1e-5, 1e-3, 1.0])
def test_direction_step_does_not_depend_on_the_learning_rate(lr):
    """
    First Adam step: every entry of the update is ±lr, so the increment has entries ±direction_lr/√d before projection.
    """
    model, layers, optimizer, constraint = setting(lambda p: torch.optim.Adam(p, lr=lr, eps=0.0))
    before = {name: factors.U.clone() for name, factors in constraint.factors().items()}
    reference = setting(lambda p: torch.optim.Adam(p, lr=0.1, eps=0.0))
    for one, opt in ((model, optimizer), (reference[0], reference[2])):
        backward(one, 0)
        opt.step()
    for name, factors in constraint.factors().items():
        torch.testing.assert_close(factors.U, reference[3].factors()[name].U, atol=2e-4, rtol=0)
        moved = (factors.U - before[name]).norm() / math.sqrt(layers[0].rank)
        assert 0.1 < moved < 0.6  # direction_lr is 0.3


def test_schedule_is_followed_and_zero_learning_rate_moves_nothing():
    model, _, optimizer, constraint = setting("adamw")
    before = constraint.state_dict()
    optimizer.param_groups[0]["lr"] = 0.0
    backward(model, 0)
    optimizer.step()
    after = constraint.state_dict()
    for key in before:
        if key.endswith((".U", ".V", ".s")):
            torch.testing.assert_close(after[key], before[key], atol=1e-6, rtol=0)


def test_scale_is_trained_by_adamw_on_the_schedule():
    model, layers, optimizer, constraint = setting("adamw", scale_lr=0.01, scale_eps=0.0)
    optimizer.param_groups[0]["lr"] *= 0.25
    backward(model, 0)
    gradients = {
        layer.name: (layer.lora_B.grad * constraint.factors()[layer.name].U).sum().item() / layer.scaling
        for layer in layers
    }
    optimizer.step()
    for layer, scale in zip(layers, constraint.scales, strict=True):
        expected = -0.01 - 0.25 * 0.01 * math.copysign(1.0, gradients[layer.name])  # Adam's first step is ±lr
        assert scale.item() == pytest.approx(expected, abs=1e-5)


def test_start_with_zero_scale_moves_s_first():
    """s = 0 as in the released UCIT setting: U and V have no gradient at first, then they train."""
    model, _, optimizer, constraint = setting("adamw", s=0.0)
    before = constraint.state_dict()
    for step in range(3):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            for name, factors in constraint.factors().items():
                torch.testing.assert_close(factors.U, before[f"{name}.U"], atol=3e-6, rtol=0)
                assert factors.s != 0.0
    assert all((f.U - before[f"{n}.U"]).abs().max() > 1e-3 for n, f in constraint.factors().items())


def test_a_factor_without_gradient_is_skipped():
    model, layers, optimizer, constraint = setting("adamw")
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    before = constraint.state_dict()
    backward(model, 1)
    layers[0].lora_A.grad = layers[0].lora_B.grad = None
    layers[1].lora_A.grad = None
    optimizer.step()
    after = constraint.state_dict()
    first, second = layers[0].name, layers[1].name
    for key in (f"{first}.U", f"{first}.V", f"{first}.s", f"{second}.V"):
        assert torch.equal(before[key], after[key]), key
    for key in (f"{second}.U", f"{second}.s", f"{layers[2].name}.V"):
        assert not torch.equal(before[key], after[key]), key


def test_a_zero_gradient_moves_on_by_momentum():
    model, layers, optimizer, constraint = setting("adamw")
    for step in range(2):
        backward(model, 0)
        if step == 1:
            for layer in layers:
                layer.lora_A.grad.zero_()
                layer.lora_B.grad.zero_()
            before = constraint.state_dict()
        optimizer.step()
        optimizer.zero_grad()
    after = constraint.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in before if key.endswith((".U", ".V", ".s")))


@pytest.mark.parametrize("name", ["adamw", "adamw_fused"])
def test_overflow_under_a_gradient_scaler_leaves_everything_unchanged(name):
    model, layers, optimizer, constraint = setting(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(number, overflow):
        scaler.scale(model(**make_text_data("bert", seed=number, size=4)[:4]).loss).backward()
        if overflow:
            layers[0].lora_A.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step(0, overflow=False)
    before = constraint.state_dict()
    weights = [p.detach().clone() for layer in layers for p in (layer.lora_A, layer.lora_B)]
    step(1, overflow=True)
    after = constraint.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(
        torch.equal(a, b) for a, b in zip(weights, (p for x in layers for p in (x.lora_A, x.lora_B)), strict=True)
    )
    assert scaler.get_scale() == 512.0
    step(2, overflow=False)
    assert not torch.equal(constraint.state_dict()[f"{layers[0].name}.U"], after[f"{layers[0].name}.U"])


def test_a_scaled_gradient_gives_the_unscaled_step():
    """A fused optimizer unscales inside its kernel; s has an optimizer of its own and must see the same gradient."""
    results = []
    for scaled in (False, True):
        model, _, optimizer, constraint = setting("adamw_fused")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(3):
            scaler.scale(model(**make_text_data("bert", seed=step, size=4)[:4]).loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(constraint.state_dict())
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key], atol=1e-5, rtol=1e-4)


def test_nan_gradients_become_nan_as_under_the_plain_optimizer():
    model, layers, optimizer, _ = setting("adamw")
    backward(model, 0)
    layers[0].lora_A.grad[0, 0] = float("nan")
    optimizer.step()
    assert layers[0].lora_A.isnan().any()
    assert not layers[1].lora_A.isnan().any()


def test_closures_are_refused():
    _, _, optimizer, _ = setting("adamw")
    with pytest.raises(RuntimeError, match=r"AdamW.step\(\) was given a closure"):
        optimizer.step(lambda: None)
    optimizer.step(None)  # as accelerate calls it


class AdamWScheduleFree(torch.optim.AdamW):
    """Stands for the optimizer of that name in a package that is not installed here."""


def test_optimizers_that_no_constraint_can_follow_are_refused_by_name():
    with pytest.raises(ValueError, match="AdamWScheduleFree cannot be kept on the manifold: the weights it evaluates"):
        setting(AdamWScheduleFree)
    with pytest.raises(ValueError, match="LBFGS cannot be kept on the manifold: it needs a closure"):
        setting(torch.optim.LBFGS)
    with pytest.raises(ValueError, match="learning rate for the LoRA factors is None"):
        setting(lambda p: Adafactor(p, scale_parameter=False, relative_step=True))
    for scaled in (torch.optim.Adafactor, lambda p: Adafactor(p, lr=1e-3, scale_parameter=True, relative_step=False)):
        with pytest.raises(
            ValueError, match=r"Adafactor cannot be kept.*size of the parameters.*scale_parameter=False"
        ):
            setting(scaled)
    with pytest.raises(ValueError, match=r"does not hold lora_A of bert\.encoder"):
        setting(lambda p: torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
    with pytest.raises(TypeError, match="got dict"):
        StiefelConstraint({}, [], {}, direction_lr=1.0, scale_lr=1.0)


def test_infeasible_basis_is_refused_and_named():
    model = get_peft_model(make_model("bert"), lora(target_modules=["query"]))
    layers = find_layers(model, "default")
    factors = {x.name: Factors(orthonormal(32, 4), orthonormal(32, 4), -0.01) for x in layers}
    bases = {x.name: orthonormal(32, 30) for x in layers}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"query \(V\): no 4 orthonormal directions are left in R\^32.*p \+ r = 34"):
        StiefelConstraint(optimizer, layers, factors, bases, direction_lr=0.1, scale_lr=0.1)


def test_bases_of_different_widths_and_none():
    model = get_peft_model(make_model("bert"), lora(target_modules=["query", "key"]))
    layers = find_layers(model, "default")
    bases, factors = {}, {}
    for i, layer in enumerate(layers):
        q = orthonormal(32, 12, i, torch.float32)
        if i:  # the first layer has no basis at all, the second an empty one
            bases[layer.name] = q[:, : 2 * (i - 1)]
        factors[layer.name] = Factors(orthonormal(32, 4, i + 9, torch.float32), q[:, 8:], -0.01)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    constraint = StiefelConstraint(optimizer, layers, factors, bases, direction_lr=0.3, scale_lr=0.01)
    for step in range(5):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    for layer in layers:
        assert maps.check_factor(constraint.factors()[layer.name].V, bases.get(layer.name), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_state_file_restores_bit_for_bit(tmp_path, dtype):
    model, layers, optimizer, constraint = setting("adamw", dtype=dtype)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    save_state(constraint.state_dict(), tmp_path)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "rest.pt")
    fresh_model, fresh_layers, fresh_optimizer, fresh = setting("adamw", dtype=dtype)
    weights, moments = torch.load(tmp_path / "rest.pt")
    fresh_model.load_state_dict(weights)
    fresh_optimizer.load_state_dict(moments)
    fresh.load_state_dict(load_state(tmp_path))
    assert factors_from_state(load_state(tmp_path), fresh_layers)[layers[0].name].s == constraint.scales[0].item()
    for step in range(3, 6):
        for one, opt in ((model, optimizer), (fresh_model, fresh_optimizer)):
            backward(one, step)
            opt.step()
            opt.zero_grad()
    expected, actual = constraint.state_dict(), fresh.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    for a, b in zip(model.parameters(), fresh_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_damaged_or_foreign_state_is_refused(tmp_path):
    _, _, _, constraint = setting("adamw")
    with pytest.raises(FileNotFoundError, match=r"eblora_state.safetensors is missing.*resume from an earlier"):
        load_state(tmp_path)
    save_state(constraint.state_dict(), tmp_path)
    path = tmp_path / "eblora_state.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        load_state(tmp_path)
    other = setting("adamw", kind="bert")[3].state_dict()
    name = constraint.layers[0].name
    other[f"{name}.U"] = other[f"{name}.U"][:, :2]
    with pytest.raises(ValueError, match=rf"expected U of {name} with shape \(32, 4\), found shape \(32, 2\)"):
        constraint.load_state_dict(other)


def test_detached_constraint_lets_go():
    model, layers, optimizer, constraint = setting("adamw")
    constraint.detach()
    backward(model, 0)
    gradient = layers[0].lora_A.grad.clone()
    optimizer.step()
    assert torch.equal(layers[0].lora_A.grad, gradient)


# ---- memory: the parameters are slices of what a step works on ----


def layer_data(layers):
    return [parameter.detach().clone() for layer in layers for parameter in (layer.lora_A, layer.lora_B)]


def test_adapters_are_saved_by_stock_peft_and_safetensors_while_they_share_memory(tmp_path):
    model, layers, optimizer, constraint = setting("adamw")
    backward(model, 0)
    optimizer.step()
    assert len({parameter.untyped_storage().data_ptr() for layer in layers for parameter in (layer.lora_A,)}) < len(
        layers
    )
    wanted = layer_data(layers)
    model.save_pretrained(tmp_path / "peft")
    save_file(
        {key: value for key, value in model.state_dict().items() if "lora_" in key}, tmp_path / "file.safetensors"
    )
    again = PeftModel.from_pretrained(make_model("bert", seed=0), tmp_path / "peft")
    assert all(map(torch.equal, layer_data(find_layers(again, "default")), wanted))
    size = sum(value.numel() * value.element_size() for value in wanted)
    assert (tmp_path / "peft" / "adapter_model.safetensors").stat().st_size < 1.5 * size
    assert (tmp_path / "file.safetensors").stat().st_size < 1.5 * size
    copied = copy.deepcopy(model)
    assert all(map(torch.equal, layer_data(find_layers(copied, "default")), wanted))
    constraint.detach()
    assert all(map(torch.equal, layer_data(layers), wanted))
    pointers = {p.untyped_storage().data_ptr() for layer in layers for p in (layer.lora_A, layer.lora_B)}
    assert len(pointers) == 2 * len(layers)  # each has memory of its own again


def test_zeroed_gradients_that_stay_give_the_same_steps():
    """`zero_grad(set_to_none=False)` lets backward accumulate in the constraint's own memory."""
    results = []
    for set_to_none in (True, False):
        model, _, optimizer, constraint = setting("adamw")
        for step in range(4):
            backward(model, step)
            backward(model, step + 10)  # two batches a step
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        results.append(constraint.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_memory_that_was_replaced_is_taken_back_with_its_values():
    """`load_state_dict(assign=True)` and the like give a parameter other memory."""
    results = []
    for replaced in (False, True):
        model, layers, optimizer, constraint = setting("adamw")
        for step in range(3):
            if replaced:
                for layer in layers:
                    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.clone(), layer.lora_B.data.clone()
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        results.append((constraint.state_dict(), layer_data(layers)))
    assert all(torch.equal(results[0][0][key], results[1][0][key]) for key in results[0][0])
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_a_parameter_of_another_dtype_in_the_middle_of_training_is_refused():
    model, layers, optimizer, _ = setting("adamw")
    backward(model, 0)
    layers[0].lora_A.data = layers[0].lora_A.data.double()
    with pytest.raises(RuntimeError, match=r"became torch\.float64 .* it was torch\.float32"):
        optimizer.step()


@pytest.mark.parametrize("threads", [1, 2])
def test_runs_of_a_stack_do_not_change_the_result(threads, monkeypatch):
    """A stack is cut into runs that fit a cache; factors without gradient cut it too."""
    results = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for cache in (factor_stack._CACHE, 1):
            monkeypatch.setattr(factor_stack, "_CACHE", cache)
            model, layers, optimizer, constraint = setting("adamw")
            for step in range(3):
                backward(model, step)
                layers[4].lora_A.grad = layers[6].lora_B.grad = None
                optimizer.step()
                optimizer.zero_grad()
            results.append(constraint.state_dict())
    finally:
        torch.set_num_threads(before)
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key], atol=2e-6, rtol=1e-5)


def test_bases_are_padded_by_a_quarter_at_most():
    bases = [None if width == 0 else torch.zeros(400, width) for width in (0, 100, 81, 80, 79, 3, 0, 64, 2)]
    groups = factor_stack.of_similar_width(bases)
    assert sorted(index for group in groups for index in group) == list(range(9))
    for group in groups:
        widths = [0 if bases[index] is None else bases[index].shape[1] for index in group]
        assert max(widths) <= 1.25 * min(widths)
    assert len(groups) == 5


def test_bases_that_are_not_orthonormal_keep_to_the_maps_as_defined():
    """Bases as released files hold them, rounded to fp16: one merged projection would not be the released step."""
    model, layers, optimizer, constraint = setting("sgd_momentum")
    layer = layers[0]
    stack = next(s for s in constraint._stacks if s.is_v and 0 in s.layers)
    assert stack.exact_bases
    rounded = {x.name: orthonormal_basis(constraint, x).half().float() for x in layers}
    factors = constraint.factors()
    constraint.detach()
    again = StiefelConstraint(optimizer, layers, factors, rounded, direction_lr=0.3, scale_lr=0.01)
    assert not any(s.exact_bases for s in again._stacks if s.is_v)
    x, f = factors[layer.name].V.double(), rounded[layer.name].double()
    backward(model, 0)
    g = layer.lora_A.grad.double().T
    optimizer.step()
    delta = -20.0 * maps.canonical_tangent(x, g, f)
    expected = maps.polar_retraction(x, maps.canonical_tangent(x, delta, f), f)
    torch.testing.assert_close(again.factors()[layer.name].V.double(), expected, atol=1e-6, rtol=0)
