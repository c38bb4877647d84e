"""ELLA's penalty against autograd, and what it does to the updates of two tasks."""

import copy

import pytest
import torch
from peft import get_peft_model

from eblora_hf import EBLoRAConfig, PublishedSequence
from eblora_hf.adapters.composition import EARLIER_TASKS
from eblora_hf.adapters.layers import find_layers
from eblora_hf.methods.ella import OverlapPenalty

from ..support.tiny import lora, make_model
from ..support.trainers import make_trainer


@pytest.mark.parametrize("kind", ["bert", "gpt2"])  # weights stored (d_out, d_in) and (d_in, d_out)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_adds_the_gradient_of_its_penalty(kind, seed):
    """In float64 against autograd, both factors, and under a fused optimizer's gradient scale."""
    model = get_peft_model(make_model(kind, dtype=torch.float64), lora(lora_alpha=8))
    earlier = lora(r=3, lora_alpha=6)
    model.add_adapter(EARLIER_TASKS, earlier)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    layers = find_layers(model, "default")
    factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    penalty = torch.zeros((), dtype=torch.float64)
    for layer in layers:
        a, b = (getattr(layer.module, side)[EARLIER_TASKS].weight.detach() for side in ("lora_A", "lora_B"))
        overlap = (2.0 * layer.lora_B @ layer.lora_A) * (2.0 * b @ a)
        penalty = penalty + 0.3 * overlap.square().sum()
    wanted = torch.autograd.grad(penalty, factors)
    optimizer = torch.optim.SGD(factors, lr=1e-3)
    hooks = OverlapPenalty(optimizer, layers, 0.3)
    assert hooks.penalty() == pytest.approx(penalty.item())
    before = copy.deepcopy([factor.detach() for factor in factors])
    for factor in factors:
        factor.grad = torch.zeros_like(factor)
    optimizer.step()
    for factor, start, gradient in zip(factors, before, wanted, strict=True):
        torch.testing.assert_close(factor.detach(), start - 1e-3 * gradient)
        factor.data.copy_(start)
        factor.grad.zero_()
    optimizer.grad_scale = torch.tensor(8.0)
    with torch.no_grad():
        hooks.before_step()
    for factor, gradient in zip(factors, wanted, strict=True):
        torch.testing.assert_close(factor.grad, 8.0 * gradient)


def test_it_keeps_updates_small_where_earlier_ones_are_large(tmp_path):
    overlaps = {}
    for weight in (0.0, 1e6):
        config = EBLoRAConfig(method="ella", overlap_weight=weight)
        folder = tmp_path / str(weight)
        make_trainer(folder, eblora_config=config, learning_rate=2e-2, max_steps=40).train()
        one, two = PublishedSequence.open(folder).adapters()
        sides = [(key, key.replace("lora_A", "lora_B")) for key in one if "lora_A" in key]
        updates = [(one[b] @ one[a], two[b] @ two[a]) for a, b in sides]
        overlaps[weight] = [((x * y).norm() / x.norm()).item() for x, y in updates]
    assert all(strong < 0.5 * none for none, strong in zip(overlaps[0.0], overlaps[1e6], strict=True))


def test_what_it_does_not_take():
    with pytest.raises(ValueError, match=r"overlap_weight=-1"):
        EBLoRAConfig(method="ella", overlap_weight=-1)
    with pytest.raises(ValueError, match=r"method='ella', earlier_tasks_error=0\.1.*as they are"):
        EBLoRAConfig(method="ella", earlier_tasks_error=0.1)
