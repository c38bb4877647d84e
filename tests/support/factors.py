"""Factors under a constraint, and gradients whose singular values are known."""

import torch
from peft import get_peft_model
from transformers.optimization import Adafactor

from eblora_hf.adapters.factors import Factors
from eblora_hf.adapters.layers import find_layers
from eblora_hf.manifold.constraint import StiefelConstraint

from .tiny import lora, make_model, make_text_data, orthonormal

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=20.0, momentum=0.9),
    "adafactor": lambda p: Adafactor(p, lr=1e-3, scale_parameter=False, relative_step=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def setting(optimizer="adamw", *, dtype=torch.float32, p=5, s=-0.01, kind="bert", **options):
    """A tiny model with random factors, a basis of width p per layer, and the constraint around an optimizer."""
    model = make_model(kind, dtype=dtype)
    model = get_peft_model(model, lora(exclude_modules=["classifier"]), autocast_adapter_dtype=dtype == torch.float32)
    layers = find_layers(model, "default")
    factors, bases = {}, {}
    for i, layer in enumerate(layers):
        q = orthonormal(layer.d_in, p + layer.rank, i, torch.float32)
        bases[layer.name] = q[:, :p]
        factors[layer.name] = Factors(orthonormal(layer.d_out, layer.rank, i + 50, torch.float32), q[:, p:], s)
    parameters = [p for p in model.parameters() if p.requires_grad]
    make = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    torch_optimizer = make(parameters)
    defaults = {"direction_lr": 0.3, "scale_lr": 0.01}
    constraint = StiefelConstraint(torch_optimizer, layers, factors, bases if p else None, **(defaults | options))
    return model, layers, torch_optimizer, constraint


def backward(model, step: int, scale: float = 1.0):
    data = make_text_data("bert", seed=step, size=4)
    (scale * model(**data[:4]).loss).backward()


def gradient(d_out: int, d_in: int, seed: int, decay: float = 0.8, dtype=torch.float64) -> torch.Tensor:
    """A matrix with singular values 1, decay, decay², …"""
    k = min(d_out, d_in)
    left, right = orthonormal(d_out, k, seed), orthonormal(d_in, k, seed + 50)
    return ((left * decay ** torch.arange(k, dtype=torch.float64)) @ right.T).to(dtype)


def captured(g: torch.Tensor, basis: torch.Tensor) -> float:
    return ((g @ basis).norm() ** 2 / g.norm() ** 2).item()
