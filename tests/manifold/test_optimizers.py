"""Any optimizer: kept on the manifold by name, by class and by factory, or refused by name with a reason."""

import functools

import bitsandbytes
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer
from transformers import TrainerCallback
from transformers.optimization import Adafactor

from eblora_hf.manifold.optimizers import entry_size

from ..support.factors import backward, setting
from ..support.tables import TABLES, WORKS, outcome, report
from ..support.tiny import make_text_data
from ..support.trainers import make_trainer

BY_NAME = [
    *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_bnb_8bit"),
    *("paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit", "rmsprop_bnb"),
    *("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd", "lomo", "adalomo"),
    *("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise", "galore_adafactor_layerwise"),
    *("apollo_adamw", "apollo_adamw_layerwise"),
]
BY_CLASS = {
    "torch AdamW, foreach": (torch.optim.AdamW, {"foreach": True}),
    "torch NAdam": (torch.optim.NAdam, {}),
    "torch RAdam": (torch.optim.RAdam, {}),
    "torch Adamax": (torch.optim.Adamax, {}),
    "torch Adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "torch ASGD": (torch.optim.ASGD, {"lr": 0.1}),
    "torch Rprop": (torch.optim.Rprop, {}),
    "torch Adafactor": (torch.optim.Adafactor, {}),
    "torch LBFGS": (torch.optim.LBFGS, {}),
    "torch Muon": (torch.optim.Muon, {}),
    "torch Muon, adjust_lr_fn=match_rms_adamw": (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}),
    "bitsandbytes AdamW8bit, 8-bit states": (bitsandbytes.optim.AdamW8bit, {"min_8bit_size": 64}),
    "PEFT LoRA-FA": (LoraFAOptimizer, {}),
}


def train(folder, **options) -> None:
    """Two tasks, with the constraints looked at after every step, and every factor moved."""
    deviations, norms = [], {}

    class Check(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            deviations.append(trainer.constraint.deviation())
            for name, factors in trainer.constraint.factors().items():
                norms.setdefault(name, factors.U.clone())

    trainer = make_trainer(folder, callbacks=[Check()], **options)
    trainer.train()
    assert len(deviations) == 12
    assert max(a for a, _ in deviations) <= 2e-6
    assert max(b for _, b in deviations) <= 2e-7
    assert all((factors.U - norms[name]).abs().max() > 0 for name, factors in trainer.constraint.factors().items())
    assert not list(folder.glob("checkpoints/*/checkpoint-*"))


@pytest.mark.parametrize("optim", BY_NAME)
def test_by_name(tmp_path, record_property, optim):
    result = outcome(lambda: train(tmp_path, optim=optim, learning_rate=5e-3, optim_target_modules=["query"]))
    refused = optim.startswith(("schedule_free", "lomo", "adalomo", "galore", "apollo"))
    if refused:
        assert result.startswith(f"optim={optim!r} cannot be kept on the manifold")
        assert not any(tmp_path.iterdir())
    assert (result == WORKS) is not refused
    report(record_property, TABLES["optimizers"], f"optim={optim}", "result", result)


@pytest.mark.parametrize("name", BY_CLASS)
def test_by_class(tmp_path, record_property, name):
    cls, options = BY_CLASS[name]
    result = outcome(lambda: train(tmp_path, optimizer_cls_and_kwargs=(cls, {"lr": 5e-3} | options)))
    assert (result == WORKS) is not (name in ("torch Adafactor", "torch LBFGS", "PEFT LoRA-FA"))
    report(record_property, TABLES["optimizers"], name, "result", result)


class MuonFactory:
    """As `Trainer` expects one: made without arguments, then called with the model."""

    def __call__(self, model, **kwargs):
        return torch.optim.Muon([p for p in model.parameters() if p.requires_grad and p.ndim == 2], **kwargs)


def test_the_name_of_a_factory_says_nothing(tmp_path):
    """Not even that a lambda is LAMB."""

    class Factory:
        def __call__(self, model, **kwargs):
            return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **kwargs)

    train(tmp_path, optimizer_cls_and_kwargs=(lambda: Factory(), {"lr": 1e-3}))


def test_a_factory(tmp_path, record_property):
    result = outcome(lambda: train(tmp_path, optimizer_cls_and_kwargs=(MuonFactory, {"lr": 1e-2})))
    assert result == WORKS
    report(record_property, TABLES["optimizers"], "a factory of torch Muon", "result", result)


@pytest.mark.parametrize("name", ["LoRA+", "Riemannian"])
def test_factories_of_peft(tmp_path, record_property, name):
    make = {
        "LoRA+": functools.partial(create_loraplus_optimizer, loraplus_lr_ratio=8.0),
        "Riemannian": create_riemannian_optimizer,
    }[name]

    def run():
        model = make_trainer(tmp_path / "unused").model
        optimizer = make(model, torch.optim.AdamW, lr=1e-3)
        trainer = make_trainer(
            tmp_path / "out",
            model=model,
            peft_config=None,
            train_dataset=make_text_data("bert"),
            optimizers=(optimizer, None),
        )
        trainer.train()
        assert max(trainer.constraint.deviation()) <= 2e-6

    result = outcome(run)
    assert (result == WORKS) is (name == "LoRA+")
    report(record_property, TABLES["optimizers"], f"PEFT {name}", "result", result)


# ---- how large the steps are ----

SIZED = {
    "AdamW": (torch.optim.AdamW, {}),
    "Adafactor": (Adafactor, {"scale_parameter": False, "relative_step": False}),
    "Lion": (bitsandbytes.optim.Lion32bit, {}),
    "AdEMAMix": (bitsandbytes.optim.AdEMAMix, {}),
    "Muon": (torch.optim.Muon, {"weight_decay": 0.0}),
    "Muon, match_rms_adamw": (torch.optim.Muon, {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", [(128, 4), (4, 128)])
@pytest.mark.parametrize("name", SIZED)
def test_updates_are_as_large_as_expected(name, shape, seed):
    """The root mean square entry of the second update, whatever the size of the gradients."""
    cls, options = SIZED[name]
    parameter = torch.nn.Parameter(torch.zeros(shape))
    optimizer = cls([parameter], lr=1e-2, **options)
    gradient = 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for _ in range(2):
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
    entry = (parameter - before).norm() / parameter.numel() ** 0.5 / 1e-2
    assert entry.item() == pytest.approx(entry_size(optimizer, optimizer.param_groups[0], *shape), rel=0.25)


def test_sgd_steps_as_far_as_its_gradients_say():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(4, 4))], lr=0.1)
    assert entry_size(optimizer, optimizer.param_groups[0], 4, 4) is None


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_the_direction_step_under_muon_does_not_depend_on_the_learning_rate(lr, adjust):
    """Every factor moves by about `direction_lr` in its first step, in units of its norm √r."""
    model, layers, optimizer, constraint = setting(
        lambda parameters: torch.optim.Muon(parameters, lr=lr, adjust_lr_fn=adjust, weight_decay=0.0),
        direction_lr=0.1,
        tangent="orthogonal",
    )
    before = {name: (factors.U.clone(), factors.V.clone()) for name, factors in constraint.factors().items()}
    backward(model, 0)
    optimizer.step()
    for layer in layers:
        for old, new in zip(before[layer.name], vars(constraint.factors()[layer.name]).values(), strict=False):
            assert 0.04 < (new - old).norm().item() / layer.rank**0.5 < 0.13


def test_a_step_inside_a_step_is_refused():
    """Where a class calls its base's `step`, torch runs the hooks of both."""

    class Wrapping(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # from the first instance on the base has hooks
    model, _, optimizer, _ = setting(Wrapping)
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"Wrapping.step\(\) calls a step of its base class"):
        optimizer.step()
