"""Geometry against independent formulas in float64, several seeds."""

import pytest
import torch

from eblora_hf.manifold import maps

from ..support.tiny import orthonormal

SEEDS = [0, 1, 2]
SHAPES = [(12, 3, 0), (40, 8, 10), (33, 1, 4), (16, 8, 8)]  # d, r, p; the last one has no direction to spare


def setting(d: int, r: int, p: int, seed: int):
    q = orthonormal(d, d, seed)
    basis = q[:, :p] if p else None
    x = q[:, p : p + r] @ orthonormal(r, r, seed + 100)
    z = torch.randn(d, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, z, basis


def projector(d: int, basis: torch.Tensor | None) -> torch.Tensor:
    identity = torch.eye(d, dtype=torch.float64)
    return identity if basis is None else identity - basis @ basis.T


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("d", "r", "p"), SHAPES)
def test_tangent_maps(d, r, p, seed):
    x, z, basis = setting(d, r, p, seed)
    outside = projector(d, basis)
    canonical = maps.canonical_tangent(x, z, basis)
    orthogonal = maps.orthogonal_tangent(x, z, basis)
    for tangent in (canonical, orthogonal):
        # X + ε δ stays orthonormal to first order: Xᵀδ is skew; and it stays outside the basis
        torch.testing.assert_close(
            x.T @ tangent + tangent.T @ x, torch.zeros(r, r, dtype=torch.float64), atol=1e-13, rtol=0
        )
        torch.testing.assert_close(outside @ tangent, tangent, atol=1e-13, rtol=0)
    # idempotent, and the tangent vector nearest to Z: the remainder is orthogonal to every tangent vector
    torch.testing.assert_close(maps.orthogonal_tangent(x, orthogonal, basis), orthogonal, atol=1e-13, rtol=0)
    assert abs(((outside @ z - orthogonal) * canonical).sum()) < 1e-12
    # the released map, written out: in-span rotation counted twice
    s = x.T @ outside @ z
    torch.testing.assert_close(canonical, x @ (s - s.T) + (outside - x @ x.T) @ z, atol=1e-13, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("d", "r", "p"), SHAPES)
def test_polar_retraction_is_the_polar_factor(d, r, p, seed):
    x, z, basis = setting(d, r, p, seed)
    delta = maps.canonical_tangent(x, z, basis)
    actual = maps.polar_retraction(x, delta, basis)
    left, _, right = torch.linalg.svd(projector(d, basis) @ (x + delta), full_matrices=False)
    torch.testing.assert_close(actual, left @ right, atol=1e-12, rtol=0)
    assert max(maps.factor_deviation(actual, basis)) < 1e-13


def test_retraction_is_second_order():
    x, z, basis = setting(40, 8, 10, 0)
    delta = maps.orthogonal_tangent(x, z, basis)
    errors = [(maps.polar_retraction(x, t * delta, basis) - x - t * delta).norm().item() for t in (1e-2, 1e-3)]
    assert 50 < errors[0] / errors[1] < 200


def test_batched_equals_one_by_one():
    settings = [setting(40, 8, 10, seed) for seed in SEEDS]
    x, z, basis = (torch.stack(tensors) for tensors in zip(*settings, strict=True))
    for function in (maps.canonical_tangent, maps.orthogonal_tangent, maps.polar_retraction):
        expected = torch.stack([function(*one) for one in settings])
        torch.testing.assert_close(function(x, z, basis), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("d", "r", "p"), [(64, 4, 16), (768, 16, 64), (2048, 64, 0)])
def test_float32_stays_at_the_rounding_floor(d, r, p):
    q = orthonormal(d, p + r, 3, torch.float32)
    basis, x = (q[:, :p] if p else None), q[:, p:].contiguous()
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        z = 0.4 / d**0.5 * torch.randn(d, r, generator=generator)
        x = maps.polar_retraction(x, maps.canonical_tangent(x, z, basis), basis)
        orthonormality, restriction = maps.factor_deviation(x, basis)
        assert orthonormality <= 2e-6
        assert restriction <= 2e-7


@pytest.mark.parametrize("length", [0.1, 1.0, 5.0, 20.0])
def test_long_steps_land_on_the_manifold_too(length):
    """RMSprop's first step is ten times its later ones."""
    q = orthonormal(32, 12, 5, torch.float32)
    basis, x = q[:, :8], q[:, 8:].contiguous()
    for seed in range(20):
        z = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed))
        moved = maps.polar_retraction(x, maps.canonical_tangent(x, length / 32**0.5 * z, basis), basis)
        orthonormality, restriction = maps.factor_deviation(moved, basis)
        assert orthonormality <= 1e-6
        assert restriction <= 2e-7


def test_polar_factor_passes_nan_on():
    y = torch.randn(3, 6, 2)
    y[1, 0, 0] = float("nan")
    x = maps.polar_factor(y)
    assert x[1].isnan().all()
    assert not x[[0, 2]].isnan().any()


def test_check_factor_says_what_is_wrong():
    x, _, basis = setting(40, 8, 10, 0)
    assert maps.check_factor(x, basis) is True
    assert maps.check_factor(x, basis, explain=True) == (True, None)
    good, reason = maps.check_factor(1.1 * x, basis, explain=True)
    assert not good
    assert "not orthonormal" in reason
    assert "2.1" in reason  # 1.1² - 1 = 0.21
    good, reason = maps.check_factor(basis[:, :8], basis, explain=True)
    assert not good
    assert "not orthogonal to the basis: max |FᵀX| = 1.0" in reason
    assert maps.check_factor(torch.full((4, 2), float("nan"))) is False


def test_check_feasible():
    maps.check_feasible(10, 4, 6)
    with pytest.raises(ValueError, match=r"q_proj: no 5 orthonormal directions.*p \+ r = 11 > d = 10"):
        maps.check_feasible(10, 5, 6, name="q_proj")


def test_full_precision_restores_the_setting():
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch < 2.9 has one switch")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with maps.full_precision():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
