"""Inputs that hold no data: smooth noise in place of pictures, random tokens in place of text."""

from collections.abc import Collection
from typing import Any

import torch
from torch.nn import functional

_GRID = 4  # points a side on which the noise of a picture is drawn


def random_inputs(
    inputs: dict[str, Any], vocabulary: int | None, special: Collection[int], generator: torch.Generator
) -> dict[str, Any]:
    """
    The inputs of a batch with nothing left of what its rows show but their number, lengths and scale.

    Args:
        inputs (`dict`): What a collator returns, on the CPU.
        vocabulary (`int`, *optional*): Number of tokens.
        special (collection of `int`): Tokens that stay where they are: those that frame a text, or stand for pictures.
        generator (`torch.Generator`): On the CPU.

    Raises:
        ValueError: if there are neither pictures nor tokens, or some of another kind.
    """
    drawn = dict(inputs)
    pictures = inputs.get("pixel_values")
    if isinstance(pictures, torch.Tensor) and pictures.ndim == 4 and pictures.is_floating_point():
        drawn["pixel_values"] = smooth_noise(pictures, generator)
    for name in ("input_ids", "decoder_input_ids"):
        tokens = inputs.get(name)
        if not isinstance(tokens, torch.Tensor) or not vocabulary:
            continue
        fixed = torch.tensor(sorted(special), dtype=torch.long)
        every = torch.arange(vocabulary)
        free = every[~torch.isin(every, fixed)]
        fresh = free[torch.randint(len(free), tokens.shape, generator=generator)].to(tokens)
        drawn[name] = torch.where(torch.isin(tokens, fixed), tokens, fresh)
    shown = [name for name in ("pixel_values", "input_ids") if name in inputs and drawn[name] is inputs[name]]
    if shown or all(drawn[name] is inputs[name] for name in drawn):
        raise ValueError(
            "anchor='random' draws `pixel_values` (rows, channels, height, width) and `input_ids` of a known "
            f"vocabulary, but the inputs are {', '.join(inputs)}. Pass a data set as `anchor`."
        )
    return drawn


def smooth_noise(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures `(B, C, H, W)` of smooth noise, with the mean and the deviation that these have in each channel."""
    rows, channels = pictures.shape[:2]
    coarse = torch.randn(rows, channels, _GRID, _GRID, generator=generator)
    noise = functional.interpolate(coarse, size=pictures.shape[2:], mode="bicubic", align_corners=True)
    over = (0, 2, 3)
    noise = (noise - noise.mean(over, keepdim=True)) / noise.std(over, keepdim=True)
    return (pictures.float().mean(over, keepdim=True) + pictures.float().std(over, keepdim=True) * noise).to(pictures)
