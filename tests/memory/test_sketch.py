"""Sketches of snapshots: what they keep, what they promise, and what they refuse."""

import pytest
import torch
from peft import PeftModel

from eblora_hf import EBLoRAConfig, PublishedSequence
from eblora_hf.adapters.layers import find_layers
from eblora_hf.memory.accumulators import MatrixSketch, MatrixSum, MomentSketch, MomentSum, Storage
from eblora_hf.memory.gradients import mean_gradients
from eblora_hf.memory.moments import token_gradient_moments
from eblora_hf.memory.sketch import extend_basis_from_sketch, principal_directions_from_sketch

from ..support.factors import captured, gradient
from ..support.tiny import lora, make_model, make_text_data, orthonormal
from ..support.trainers import make_trainer

SEEDS = [0, 1, 2]


def parts(matrix: torch.Tensor, seed: int, count: int = 5) -> list[torch.Tensor]:
    """Summands of `count` times a matrix that are nothing like it one by one."""
    noise = [torch.randn(matrix.shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
    mean = sum(noise) / count
    return [matrix + 0.1 * (part - mean).to(matrix) for part in noise]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decay", [0.7, 0.93])
def test_a_sketched_gradient_gives_a_basis_that_holds_what_it_says(seed, decay):
    g = gradient(500, 400, seed, decay, torch.float32)
    sketch = MatrixSketch(Storage(sketch=80), 500, 400)
    for part in parts(g, seed):
        sketch.add(torch.eye(500), part, 2.0)
    sketch = sketch.mean(10.0)
    assert sketch.matrix.shape == (80, 400)
    for before in (None, orthonormal(400, 30, seed + 9, torch.float32)):
        extension = extend_basis_from_sketch(sketch, before, threshold=0.95)
        both = extension.columns if before is None else torch.cat([before, extension.columns], dim=1)
        held = captured(g.double(), both.double())
        assert held >= 0.95
        assert 0.95 <= extension.captured <= held + 0.005  # estimated from below
        identity = torch.eye(both.shape[1], dtype=torch.float64)
        assert (both.double().T @ both.double() - identity).abs().max() < 2e-6
    u, sigma, v = principal_directions_from_sketch(sketch, 4)
    left, expected, right = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(sigma, expected[:4], rtol=0.02, atol=0)
    if decay == 0.7:
        assert (u @ v.T * (left[:, :4] @ right[:4])).sum() > 3.9  # of 4 if they are the same


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decay", [0.7, 0.9, 0.97])
def test_a_sketched_moment_never_overstates_what_a_basis_holds(seed, decay):
    x = 3.0 * gradient(900, 300, seed, decay, torch.float32)
    sketch = MomentSketch(Storage(sketch=100), 300)
    for rows in x.split(200):
        sketch.add(rows)
    sketch = sketch.mean(900)
    k, approximation = (x.double().T @ x.double()) / 900, sketch.matrix.double().T @ sketch.matrix.double()
    assert sketch.energy == pytest.approx(k.trace().item(), rel=1e-6)
    assert torch.linalg.eigvalsh(k - approximation).min() > -1e-6 * sketch.energy
    extension = extend_basis_from_sketch(sketch, threshold=0.9)
    held = captured(x.double(), extension.columns.double())
    assert held >= 0.9
    assert 0.9 <= extension.captured <= held + 1e-6


def test_a_sketch_too_small_is_refused_and_named():
    x = gradient(900, 300, 0, 0.99, torch.float32)
    moment, matrix = MomentSketch(Storage(sketch=8), 300), MatrixSketch(Storage(sketch=8), 900, 300)
    moment.add(x)
    matrix.add(torch.eye(900), x, 1.0)
    for sketch in (moment.mean(1), matrix.mean(1.0)):
        with pytest.raises(ValueError, match=r"^layer: a sketch of 8 directions holds .*90\.00%.*`snapshot_sketch`"):
            extend_basis_from_sketch(sketch, threshold=0.9, name="layer")
        with pytest.raises(ValueError, match="no 9 principal ones"):
            principal_directions_from_sketch(sketch, 9)
        # a cap is the user's own wish
        assert extend_basis_from_sketch(sketch, threshold=0.9, max_columns=3).capped


def test_small_layers_are_not_sketched():
    storage = Storage(sketch=64)
    assert isinstance(storage.matrix(256, 4096), MatrixSum)
    assert isinstance(storage.matrix(512, 512), MatrixSketch)
    assert isinstance(storage.moment(128), MomentSum)
    assert isinstance(storage.moment(512), MomentSketch)


@pytest.mark.parametrize("collect", [mean_gradients, token_gradient_moments])
def test_offloaded_sums_are_the_same(collect):
    peft = PeftModel(make_model("gpt2"), lora(r=2)).eval()
    layers, data = find_layers(peft, "default"), make_text_data("gpt2")
    results = [
        collect(peft, layers, [(data[:4], 4), (data[4:6], 2)], lambda m, x: m(**x).loss, storage)
        for storage in (Storage(), Storage(offload=True))
    ]
    for name, matrix in results[0].items():
        torch.testing.assert_close(results[1][name], matrix)


@pytest.mark.parametrize("basis_from", ["gradients", "token-gradients"])
def test_a_trainer_with_sketches_learns_two_tasks(tmp_path, basis_from, monkeypatch):
    """The layers of the tiny model are too small for a sketch that is worth it, so that rule is lifted."""
    monkeypatch.setattr(Storage, "matrix", lambda self, d_out, d_in: MatrixSketch(self, d_out, d_in))
    monkeypatch.setattr(Storage, "moment", lambda self, d_in, basis=None: MomentSketch(self, d_in, basis))
    config = EBLoRAConfig(snapshot_sketch=30, energy_threshold=0.8, basis_from=basis_from, basis_dtype="bfloat16")
    trainer = make_trainer(tmp_path, eblora_config=config)
    trainer.train()
    published = PublishedSequence.open(tmp_path)
    assert published.names == ["one", "two"]
    bases = published.bases()
    for name, basis in bases.items():
        assert torch.equal(trainer.bases[name], basis)
        assert (basis.double().T @ basis.double() - torch.eye(basis.shape[1])).abs().max() < 2e-6
