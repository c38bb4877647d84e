"""The step's own versions of the maps against their definitions, in both memory orders, and its inverse root."""

import pytest
import torch

from eblora_hf.manifold import inplace, maps

from ..support.tiny import orthonormal

SHAPES = [(40, 4, 0), (40, 4, 9), (64, 16, 20), (24, 12, 12)]  # d, r, p


def stacks(d: int, r: int, p: int, seed: int, wide: bool):
    """Factors outside a basis and arbitrary increments, three of each; as views of transposed memory if `wide`."""
    q = torch.stack([orthonormal(d, r + p, seed + i) for i in range(3)])
    basis = q[..., :p].contiguous() if p else None
    z = torch.randn(3, d, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = q[..., p:].contiguous()
    if wide:
        x, z = x.mT.contiguous().mT, z.mT.contiguous().mT
    return x, z, basis


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("tangent", ["canonical", "orthogonal"])
@pytest.mark.parametrize(("d", "r", "p"), SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_step_is_the_maps_as_they_are_defined(seed, d, r, p, tangent, wide):
    x, z, basis = stacks(d, r, p, seed, wide)
    define = {"canonical": maps.canonical_tangent, "orthogonal": maps.orthogonal_tangent}[tangent]
    projected = z.clone(memory_format=torch.preserve_format)
    inner = inplace.tangent_(projected, x, basis, tangent)
    torch.testing.assert_close(projected, define(x, z, basis), atol=1e-13, rtol=0)
    torch.testing.assert_close(inner, x.mT @ maps.restrict(z, basis), atol=1e-13, rtol=0)
    expected = maps.polar_retraction(x, define(x, 0.3 * z, basis), basis)
    y = z.clone(memory_format=torch.preserve_format)
    gram = inplace.move_(y, x, basis, tangent, 0.3)
    torch.testing.assert_close(gram, y.mT @ y, atol=1e-12, rtol=0)
    moved = x.clone(memory_format=torch.preserve_format)
    inplace.retract_(moved, y, inplace.inverse_root(gram))
    torch.testing.assert_close(moved, expected, atol=1e-12, rtol=0)
    assert moved.stride() == x.stride()
    assert max(maps.factor_deviation(moved, basis)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-3, 0.3, 3.0, 60.0])
@pytest.mark.parametrize("look", [True, False], ids=["looks", "does not look"])
def test_inverse_root_of_any_step(size, dtype, look):
    d = size * torch.randn(5, 40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 40**0.5
    gram = (torch.eye(8, dtype=torch.float64) + d.mT @ d).to(dtype)
    root = inplace.inverse_root(gram, None if look else 1e4 * 40)
    assert root.dtype == torch.float64
    deviation = root @ gram.double() @ root - torch.eye(8, dtype=torch.float64)
    # the last step squares what rounding of the iteration has left, which grows with the size of the step
    assert deviation.abs().max() < (1e-12 if dtype == torch.float64 else 1e-8 if size < 1.0 else 1e-6)
    torch.testing.assert_close(root, root.mT, atol=1e-6, rtol=0)


def test_inverse_root_passes_nan_on_and_spares_the_others():
    gram = torch.eye(4).repeat(3, 1, 1)
    gram[1, 0, 0] = float("nan")
    root = inplace.inverse_root(gram)
    assert root[1].isnan().any()
    torch.testing.assert_close(root[[0, 2]], torch.eye(4, dtype=torch.float64).repeat(2, 1, 1))


def test_without_looking_a_matrix_beyond_the_limit_becomes_nan():
    gram = torch.stack([2.0 * torch.eye(3), 2e4 * torch.eye(3)])
    root = inplace.inverse_root(gram, 1e4)
    torch.testing.assert_close(root[0], 0.5**0.5 * torch.eye(3, dtype=torch.float64))
    assert root[1].isnan().all()


def test_without_looking_nothing_waits_for_the_device():
    """A tensor without data has nothing to look at: reading a number of it raises."""
    gram = torch.empty(7, 4, 4, device="meta")
    assert inplace.inverse_root(gram, 1e4).shape == (7, 4, 4)
    with pytest.raises((RuntimeError, NotImplementedError)):
        inplace.inverse_root(gram)
