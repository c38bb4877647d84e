"""The image transformations of which the tasks of the embedded benchmark are made, by name.

Images are `(n, 1, 8, 8)` in [-1, 1], where -1 is the background. Every transformation is a function of the images
alone, so that a task is the same for all methods and seeds.
"""

import re
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

Transformation = Callable[[torch.Tensor], torch.Tensor]


def warp(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """
    Samples images at affinely transformed positions; outside is background. `matrices` is `(2, 3)` or `(n, 2, 3)`.
    """
    matrices = matrices.to(images.dtype).expand(len(images), 2, 3)
    grid = functional.affine_grid(matrices, list(images.shape), align_corners=False)
    return functional.grid_sample(images + 1.0, grid, align_corners=False) - 1.0


def rotate(images: torch.Tensor, degrees: float = 60.0) -> torch.Tensor:
    angle = np.deg2rad(degrees)
    return warp(images, torch.tensor([[np.cos(angle), -np.sin(angle), 0.0], [np.sin(angle), np.cos(angle), 0.0]]))


def shear(images: torch.Tensor, amount: float = 0.6) -> torch.Tensor:
    return warp(images, torch.tensor([[1.0, amount, 0.0], [0.0, 1.0, 0.0]]))


def zoom(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Magnifies by a factor around the centre."""
    return warp(images, torch.tensor([[1.0 / factor, 0.0, 0.0], [0.0, 1.0 / factor, 0.0]]))


def invert_left_half(images: torch.Tensor) -> torch.Tensor:
    images = images.clone()
    images[..., : images.shape[-1] // 2] *= -1.0
    return images


def invert_top_half(images: torch.Tensor) -> torch.Tensor:
    return invert_left_half(images.mT).mT


def dim(images: torch.Tensor, factor: float = 0.3) -> torch.Tensor:
    """Brightness above the background times a factor."""
    return factor * (images + 1.0) - 1.0


def edges(images: torch.Tensor) -> torch.Tensor:
    """Gradient magnitude, scaled so that each image uses the range [-1, 1]."""
    dy, dx = torch.gradient(images, dim=(-2, -1))
    magnitude = (dy**2 + dx**2).sqrt()
    return 2.0 * magnitude / magnitude.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-6) - 1.0


def swap_columns(images: torch.Tensor) -> torch.Tensor:
    """Swaps each pair of neighbouring columns."""
    n, channels, height, width = images.shape
    return images.reshape(n, channels, height, width // 2, 2).flip(-1).reshape(images.shape)


def swap_rows(images: torch.Tensor) -> torch.Tensor:
    """Swaps each pair of neighbouring rows."""
    return swap_columns(images.mT).mT


def overlay_grid(images: torch.Tensor, level: float = 0.7) -> torch.Tensor:
    """Draws lines of brightness `level` over every fourth row and column."""
    images = images.clone()
    images[..., ::4, :] = level
    images[..., :, ::4] = level
    return images


def overlay_dots(images: torch.Tensor, level: float = 0.7) -> torch.Tensor:
    """Draws dots of brightness `level` at every third row and column."""
    images = images.clone()
    images[..., ::3, ::3] = level
    return images


def add_noise(images: torch.Tensor, level: float = 0.5) -> torch.Tensor:
    """Gaussian noise, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    return images + level * torch.randn(images.shape, generator=generator, dtype=images.dtype)


def permute(images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """One permutation of all pixels."""
    order = torch.randperm(images.shape[-2] * images.shape[-1], generator=torch.Generator().manual_seed(seed))
    return images.flatten(-2)[..., order].reshape(images.shape)


# the six of the protocol, in its order, come first
TRANSFORMATIONS: dict[str, Transformation] = {
    "rotate-60": rotate,
    "invert-left": invert_left_half,
    "shear": shear,
    "edges": edges,
    "swap-columns": swap_columns,
    "grid": overlay_grid,
    "upright": lambda images: images,
    "flip-horizontal": lambda images: images.flip(-1),
    "flip-vertical": lambda images: images.flip(-2),
    "transpose": lambda images: images.mT,
    "shear-left": lambda images: shear(images, -0.6),
    "zoom-in": lambda images: zoom(images, 1.5),
    "zoom-out": lambda images: zoom(images, 0.6),
    "invert": lambda images: -images,
    "invert-top": invert_top_half,
    "dim": dim,
    "swap-rows": swap_rows,
    "dots": overlay_dots,
    "noise": add_noise,
    "permute": permute,
}
PROTOCOL_TASKS = tuple(TRANSFORMATIONS)[:6]
_ROTATION = re.compile(r"rotate-(-?\d+(?:\.\d+)?)")


def transformation(name: str) -> Transformation:
    """
    The transformation of a name: one of `TRANSFORMATIONS`, or `rotate-<degrees>` with any angle.

    Raises:
        ValueError: for any other name; the message lists those that exist.
    """
    if name in TRANSFORMATIONS:
        return TRANSFORMATIONS[name]
    if match := _ROTATION.fullmatch(name):
        degrees = float(match.group(1))
        return lambda images: rotate(images, degrees)
    raise ValueError(
        f"There is no transformation {name!r}: expected rotate-<degrees> or one of {', '.join(TRANSFORMATIONS)}."
    )
