"""What is spent on remembering: representatives of tokens, columns within a budget, storage by shapes."""

import pytest
import torch

from eblora_hf.memory.accumulators import MatrixSketch, MomentSketch, Storage
from eblora_hf.memory.basis import extend_basis
from eblora_hf.memory.budget import LayerShape, bytes_of_sums, choose_storage, within_budget
from eblora_hf.memory.moments import representatives
from eblora_hf.memory.sketch import extend_basis_from_sketch

from ..support.factors import captured, gradient

SEEDS = [0, 1, 2]
LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def layers(rank: int, blocks: int = 32) -> list[LayerShape]:
    return [LayerShape(d_out, d_in, rank) for d_out, d_in in LLAMA_7B * blocks]


@pytest.mark.parametrize("seed", SEEDS)
def test_representatives_have_the_trace_and_nearly_the_moment_of_all(seed):
    x = gradient(4000, 40, seed, 0.9, torch.float64)
    weights = torch.rand(4000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole = (x * weights[:, None]).T @ x
    rows = representatives(x, weights, 800, torch.float64)
    assert rows.shape == (800, 40)
    torch.testing.assert_close((rows.T @ rows).trace(), whole.trace())
    torch.testing.assert_close(rows.norm(dim=1), rows.norm(dim=1)[:1].expand(800))  # the same energy each
    assert (rows.T @ rows - whole).norm() <= 0.1 * whole.norm()
    basis = extend_basis(rows.T @ rows, threshold=0.97, second_moment=True).columns
    assert captured((x * weights.sqrt()[:, None]), basis) >= 0.96


def test_all_rows_are_taken_where_they_are_few():
    x, weights = torch.randn(5, 3), torch.tensor([4.0, 0.0, 1.0, 9.0, 1.0])
    for count in (None, 5, 8):
        torch.testing.assert_close(representatives(x, weights, count, torch.float32), x * weights.sqrt()[:, None])


def test_rows_of_no_weight_stand_for_nothing():
    x, weights = torch.randn(6, 3), torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0, 0.0])
    rows = representatives(x, weights, 3, torch.float32)
    torch.testing.assert_close(rows.T @ rows, 2.0 * torch.outer(x[2], x[2]))
    assert torch.equal(representatives(x, torch.zeros(6), 3, torch.float32), torch.zeros(3, 3))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_budget_keeps_what_holds_most_for_its_size(seed):
    """Against a search over all ways to shorten three layers."""
    extensions = {
        name: extend_basis(gradient(30, d, seed + i, decay, torch.float64), threshold=0.99)
        for i, (name, d, decay) in enumerate((("a", 6, 0.6), ("b", 6, 0.9), ("c", 6, 0.8)))
    }
    held = {name: [x.inside, *x.energies.tolist()] for name, x in extensions.items()}
    kept = within_budget(extensions, 6 * 8)
    assert sum(x.columns.shape[1] for x in kept.values()) == 8
    best = max(
        held["a"][i] + held["b"][j] + held["c"][8 - i - j]
        for i in range(len(held["a"]))
        for j in range(len(held["b"]))
        if 0 <= 8 - i - j < len(held["c"])
    )
    assert sum(x.captured for x in kept.values()) == pytest.approx(best)
    for name, x in kept.items():
        count = x.columns.shape[1]
        assert torch.equal(x.columns, extensions[name].columns[:, :count])
        assert x.captured == held[name][count]
        assert x.capped == (count < extensions[name].columns.shape[1])


def test_a_sketch_nobody_asked_for_is_a_cap_like_another():
    x = gradient(900, 300, 0, 0.99, torch.float32)
    sketches = MomentSketch(Storage(sketch=8), 300), MatrixSketch(Storage(sketch=8), 900, 300)
    sketches[0].add(x)
    sketches[1].add(torch.eye(900), x, 1.0)
    for sketch in sketches:
        extension = extend_basis_from_sketch(sketch.mean(1.0), threshold=0.9, may_miss=True)
        assert extension.capped
        assert extension.captured < 0.9
        (kept,) = within_budget({"a": extension}, 300 * 3).values()
        assert kept.columns.shape == (300, 3)
        assert kept.captured <= extension.captured


def test_a_budget_that_is_not_reached_changes_nothing():
    extensions = {"a": extend_basis(gradient(30, 6, 0, 0.6, torch.float64))}
    assert within_budget(extensions, 36) is extensions


@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("second_moment", [False, True])
def test_sums_of_7b_take_a_quarter_of_the_weights_at_most(rank, second_moment):
    shapes = layers(rank)
    storage = choose_storage(shapes, second_moment=second_moment, budget=4.0)
    assert not storage.offload
    weights = sum(2 * shape.d_in * shape.d_out for shape in shapes)
    assert bytes_of_sums(shapes, storage, second_moment=second_moment) <= 0.25 * weights
    assert bytes_of_sums(shapes, Storage(), second_moment=second_moment) >= 2 * weights


def test_small_models_are_summed_up_whole_and_extreme_ranks_on_the_cpu():
    assert choose_storage([LayerShape(768, 768, 16)] * 72, second_moment=True, budget=4.0) == Storage()
    assert choose_storage(layers(512), second_moment=False, budget=4.0) == Storage(offload=True)


@pytest.mark.parametrize("second_moment", [False, True])
def test_the_bytes_are_those_of_the_tensors(second_moment):
    shapes = [LayerShape(600, 400, 4)] * 2 + [LayerShape(400, 600, 4)]
    storage = Storage(sketch=40)
    held = 0
    for shape in shapes:
        if second_moment:
            total = storage.moment(shape.d_in)
            total.add(torch.randn(5, shape.d_in))
        else:
            total = storage.matrix(shape.d_out, shape.d_in)
            total.add(torch.randn(5, shape.d_out), torch.randn(5, shape.d_in), 1.0)
        held += sum(4 * x.numel() for x in total.tensors(torch.zeros(())) if x.numel() > 2)
    held += sum(4 * x.numel() for x in storage._drawn.values())
    assert bytes_of_sums(shapes, storage, second_moment=second_moment) == held
