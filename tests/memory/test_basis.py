"""The energy rule, extension and principal directions against brute force in float64."""

import pytest
import torch

from eblora_hf.memory.basis import (
    column_cap,
    extend_basis,
    join_basis,
    principal_directions,
    principal_weight_directions,
)

from ..support.factors import captured, gradient
from ..support.tiny import orthonormal

SEEDS = [0, 1, 2]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize(("d_out", "d_in"), [(20, 30), (30, 20)])
def test_extension_is_the_smallest_that_reaches_the_threshold(seed, threshold, d_out, d_in):
    first, second = gradient(d_out, d_in, seed), gradient(d_out, d_in, seed + 7)
    one = extend_basis(first, threshold=threshold)
    basis = one.columns
    assert captured(first, basis) >= threshold - 1e-12
    assert captured(first, basis[:, :-1]) < threshold
    assert one.captured == pytest.approx(captured(first, basis), abs=1e-12)
    two = extend_basis(second, basis, threshold=threshold)
    both = torch.cat([basis, two.columns], dim=1)
    assert captured(second, both) >= threshold - 1e-12
    if two.columns.shape[1] > 0:
        assert captured(second, both[:, :-1]) < threshold
    assert two.captured == pytest.approx(captured(second, both), abs=1e-12)
    identity = torch.eye(both.shape[1], dtype=torch.float64)
    torch.testing.assert_close(both.T @ both, identity, atol=1e-12, rtol=0)


def test_nothing_is_added_for_what_is_known():
    g = gradient(20, 30, 0)
    basis = extend_basis(g, threshold=0.99).columns
    again = extend_basis(3.0 * g, basis, threshold=0.99)
    assert again.columns.shape == (30, 0)
    assert again.captured >= 0.99


def test_exact_boundary_counts_for_gradients_and_not_for_weights():
    # energies 4, 4, 1, 1 of 10: two directions hold exactly 0.8
    diagonal = torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    assert extend_basis(diagonal, threshold=0.8).columns.shape[1] == 2
    assert principal_weight_directions(diagonal, 0.8).shape[1] == 1
    assert principal_weight_directions(diagonal, 0.1).shape[1] == 1  # at least one


def test_cap_keeps_the_strongest_columns_and_says_so():
    g = gradient(20, 30, 0)
    free = extend_basis(g, threshold=0.99)
    capped = extend_basis(g, threshold=0.99, max_columns=3)
    assert not free.capped
    assert capped.capped
    torch.testing.assert_close(capped.columns, free.columns[:, :3])
    assert capped.captured == pytest.approx(captured(g, capped.columns), abs=1e-12)


def test_threshold_one_takes_no_noise():
    g = gradient(20, 30, 0, decay=0.5)[:, :]
    low_rank = g @ orthonormal(30, 5, 9) @ orthonormal(30, 5, 9).T
    extension = extend_basis(low_rank, threshold=1.0)
    assert extension.columns.shape[1] == 5
    assert not extension.capped


def test_twenty_tasks_stay_orthonormal_in_float32():
    basis = torch.zeros(200, 0)
    for seed in range(20):
        g = gradient(60, 200, seed, decay=0.6, dtype=torch.float32)
        columns = extend_basis(g, basis if basis.shape[1] else None, threshold=0.95).columns
        basis = torch.cat([basis, columns], dim=1)
    assert basis.shape[1] >= 60
    assert (basis.double().T @ basis.double() - torch.eye(basis.shape[1])).abs().max() < 2e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_principal_directions_match_a_projected_svd(seed):
    g, basis = gradient(20, 30, seed), orthonormal(30, 6, seed + 20)
    u, sigma, v = principal_directions(g, 4, basis)
    left, expected, right = torch.linalg.svd(g - g @ basis @ basis.T)
    torch.testing.assert_close(sigma, expected[:4])
    torch.testing.assert_close(u @ v.T, left[:, :4] @ right[:4], atol=1e-10, rtol=0)
    assert (u.T @ g @ v).diagonal().min() > 0  # along the gradient
    assert (basis.T @ v).abs().max() < 1e-14


def test_principal_directions_of_a_gradient_of_lower_rank_avoid_the_basis():
    basis = orthonormal(30, 20, 1)
    g = orthonormal(20, 2, 2) @ orthonormal(30, 2, 3).T  # rank 2, but 4 directions are asked for
    u, _, v = principal_directions(g, 4, basis)
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, identity, atol=1e-12, rtol=0)
    torch.testing.assert_close(v.T @ v, identity, atol=1e-12, rtol=0)
    assert (basis.T @ v).abs().max() < 1e-12
    again = principal_directions(g, 4, basis)[2]
    assert torch.equal(v, again)


@pytest.mark.parametrize("function", [extend_basis, lambda g, name: principal_directions(g, 2, name=name)])
@pytest.mark.parametrize(
    ("g", "words"), [(torch.zeros(4, 5), "all zero"), (torch.full((4, 5), float("inf")), "not finite")]
)
def test_useless_gradients_are_refused_by_name(function, g, words):
    with pytest.raises(ValueError, match=f"^layers.0.q_proj: {words}"):
        function(g, name="layers.0.q_proj")


def test_infeasible_rank_and_shapes_are_refused():
    g = gradient(20, 30, 0)
    with pytest.raises(ValueError, match=r"p \+ r = 32 > d = 30"):
        principal_directions(g, 6, orthonormal(30, 26))
    with pytest.raises(ValueError, match=r"expected \(30, p\)"):
        extend_basis(g, orthonormal(20, 2))
    with pytest.raises(ValueError, match=r"\(0, 1\], got 99"):
        extend_basis(g, threshold=99)


def test_column_cap_leaves_room_for_the_next_task():
    assert column_cap(d_in=64, rank=4, columns=0) == 60
    assert column_cap(d_in=64, rank=4, columns=58) == 2
    assert column_cap(d_in=64, rank=4, columns=60) == 0
    assert column_cap(d_in=64, rank=4, columns=10, max_fraction=0.25) == 6


# ---- large matrices: a randomised search, or a Gram matrix ----


@pytest.mark.parametrize(("d_out", "d_in"), [(600, 900), (900, 600)])
@pytest.mark.parametrize("decay", [0.8, 0.97, 0.999], ids=["low rank", "middle", "high rank"])
@pytest.mark.parametrize("seed", SEEDS)
def test_large_gradients_hold_what_was_asked_in_hardly_more_columns(seed, decay, d_out, d_in):
    g = gradient(d_out, d_in, seed, decay, torch.float32)
    basis = orthonormal(d_in, 20, seed, torch.float32)
    for threshold in (0.9, 0.99):
        for before in (None, basis):
            extension = extend_basis(g, before, threshold=threshold)
            both = extension.columns if before is None else torch.cat([before, extension.columns], dim=1)
            held = captured(g.double(), both.double())
            assert held >= threshold
            assert extension.captured == pytest.approx(held, abs=1e-6)
            residual = g.double() if before is None else g.double() - g.double() @ before.double() @ before.double().T
            inside = 1.0 - (residual.norm() ** 2 / g.double().norm() ** 2).item()
            energies = inside + torch.linalg.svdvals(residual).square().cumsum(0) / g.double().norm() ** 2
            fewest = int((energies < threshold).sum()) + 1
            assert fewest <= extension.columns.shape[1] <= fewest + 1
            identity = torch.eye(both.shape[1], dtype=torch.float64)
            assert (both.double().T @ both.double() - identity).abs().max() < 2e-6


@pytest.mark.parametrize("d_out", [1600, 1100])
def test_many_weak_directions_are_not_taken_for_noise(d_out):
    g = gradient(d_out, 1100, 0, 0.9965, torch.float32)  # from 1 down to 0.02, as of a gradient of high rank
    extension = extend_basis(g, threshold=0.999)
    assert captured(g.double(), extension.columns.double()) >= 0.999 - 1e-6
    moment = extend_basis(g.T @ g, threshold=0.999, second_moment=True)
    assert captured(g.double(), moment.columns.double()) >= 0.999 - 1e-5


@pytest.mark.parametrize("decay", [0.8, 0.999])
@pytest.mark.parametrize("d", [40, 700])
def test_a_second_moment_gives_the_basis_of_what_it_is_the_moment_of(d, decay):
    g = gradient(d // 2, d, 0, decay)
    basis = orthonormal(d, 5, 3)
    for before in (None, basis):
        plain = extend_basis(g, before, threshold=0.95)
        moment = extend_basis(g.T @ g, before, threshold=0.95, second_moment=True)
        assert 0 <= moment.columns.shape[1] - plain.columns.shape[1] <= 1
        both = moment.columns if before is None else torch.cat([before, moment.columns], dim=1)
        assert captured(g, both) >= 0.95
        assert moment.captured == pytest.approx(captured(g, both), abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_principal_directions_of_a_large_gradient(seed):
    g, basis = gradient(700, 900, seed, 0.9, torch.float32), orthonormal(900, 6, seed + 20, torch.float32)
    u, sigma, v = principal_directions(g, 8, basis)
    residual = g.double() - g.double() @ basis.double() @ basis.double().T
    left, expected, right = torch.linalg.svd(residual, full_matrices=False)
    torch.testing.assert_close(sigma.double(), expected[:8], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((u @ v.T).double(), left[:, :8] @ right[:8], atol=1e-4, rtol=0)
    assert (basis.T @ v).abs().max() < 1e-6
    assert torch.equal(v, principal_directions(g, 8, basis)[2])


@pytest.mark.parametrize("seed", SEEDS)
def test_stored_in_bf16_a_basis_is_orthonormal_again_and_holds_as_much(seed):
    gs, exact, stored = [gradient(60, 300, seed + 10 * i, 0.9) for i in range(4)], None, None
    for g in gs:
        columns = extend_basis(g.float(), exact, threshold=0.98).columns
        exact = join_basis(exact, columns)
        stored = join_basis(stored, columns.bfloat16())
    for basis in (exact, stored):
        assert basis.dtype == torch.float32
        assert (basis.double().T @ basis.double() - torch.eye(basis.shape[1])).abs().max() < 2e-6
    for g in gs:
        assert captured(g, stored.double()) >= captured(g, exact.double()) - 5e-5
