"""Snapshots without a trainer: any model, any loader, any loss."""

import pytest
import torch
from peft import get_peft_model

from eblora_hf import EBLoRAConfig
from eblora_hf.adapters.layers import find_layers
from eblora_hf.trainers.snapshots import take_snapshot

from ..support.tiny import lora, make_model, make_text_data

DATA = make_text_data("bert", size=12)


def setting(dropout: float = 0.0):
    model = get_peft_model(make_model("bert", dropout=dropout), lora(exclude_modules=["classifier"]))
    return model, find_layers(model, "default")


def take(model, layers, of="gradients", **options):
    defaults = {
        "samples": len(DATA),
        "load": lambda batches: (DATA[batch] for batch in batches),
        "loss": lambda model, inputs: model(**inputs).loss,
        "config": EBLoRAConfig(snapshot_fraction=1.0),
        "seed": 0,
        "batch_size": 4,
    }
    return take_snapshot(model, layers, of, **(defaults | options))


def test_gradients_are_those_of_the_mean_loss_over_all_samples():
    model, layers = setting(dropout=0.5)
    model.train()
    snapshot = take(model, layers)
    assert model.training  # and yet no dropout
    model.eval()
    for layer in layers:
        layer.weight.requires_grad_(True)
    model(**DATA[:]).loss.backward()
    for layer in layers:
        torch.testing.assert_close(snapshot[layer.name], layer.weight.grad, atol=1e-7, rtol=1e-4)


def test_shares_of_processes_add_up():
    """What two processes would reduce: each takes its batches, and every sample counts once."""
    model, layers = setting()
    seen = []

    def load(batches):
        seen.extend(batches)
        return (DATA[batch] for batch in batches)

    for index in range(2):
        take(model, layers, load=load, process_index=index, world_size=2, batch_size=5)
    assert len(seen) == 4  # three batches, and the second process repeats one without weight
    assert sorted(i for batch in seen[:3] for i in batch) == list(range(12))


@pytest.mark.parametrize("of", ["token-gradients", "features"])
def test_moments_are_square_and_symmetric(of):
    model, layers = setting()
    for name, moment in take(model, layers, of).items():
        assert moment.shape == (next(layer.d_in for layer in layers if layer.name == name),) * 2
        torch.testing.assert_close(moment, moment.T)


def test_the_model_comes_back_in_its_mode_when_the_loss_fails():
    model, layers = setting()
    model.train()

    def loss(model, inputs):
        raise RuntimeError("my loss")

    with pytest.raises(RuntimeError, match="my loss"):
        take(model, layers, loss=loss)
    assert model.training
    assert all(layer.lora_A.requires_grad for layer in layers)
