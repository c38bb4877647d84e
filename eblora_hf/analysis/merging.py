"""Merging adapters: their weighted sum as one adapter, exactly, smoothed before if wanted."""

import math

from ..adapters.composition import AdapterState, concatenate, factors_of
from .adapters import Adapter, factor_key
from .smoothing import smooth_adapter


def merge_adapters(adapters: list[AdapterState], *, weight: float = 1.0, smooth: str = "none") -> AdapterState:
    """
    The sum `weight` · Σ ΔW_i as one adapter, without rounding: the factors side by side, and ranks that add up.

    Args:
        adapters (`list[dict[str, torch.Tensor]]`): Folded adapters of the same layers.
        weight (`float`, defaults to 1.0): Weight of every adapter.
        smooth (`str`, defaults to `"none"`): `"none"`, or what [`smooth_adapter`] keeps of each adapter before they
            are added: `"sum"` or `"frobenius"`.

    Returns:
        `dict[str, torch.Tensor]`: Folded; what is in it beside LoRA (heads, biases) is the last adapter's.

    Raises:
        ValueError: if the adapters are of different layers, the weight is not finite, or for another `smooth`.
    """
    if not math.isfinite(weight):
        raise ValueError(f"weight={weight!r}: expected a finite number.")
    if smooth != "none":
        adapters = [smooth_adapter(adapter, smooth) for adapter in adapters]
    merged = concatenate(adapters)
    for name, b in factors_of(merged, "lora_B").items():
        merged[factor_key(name, "lora_B")] = weight * b
    return merged


def check_same_layers(adapters: list[Adapter]) -> None:
    """
    Raises if adapters are not of the same layers of one model.

    Raises:
        ValueError: naming the two adapters and the layers in which they differ, by name or shape.
    """
    first = adapters[0]
    for other in adapters[1:]:
        different = dict(_shapes(first.state).items() ^ _shapes(other.state).items())
        if different:
            raise ValueError(
                f"{first.source} and {other.source} cannot be added: they adapt different layers, or layers of "
                f"different shapes: {', '.join(sorted(different))}. Merge adapters of one base model with the same "
                "target modules."
            )


def _shapes(adapter: AdapterState) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each layer."""
    lora_a = factors_of(adapter, "lora_A")
    return {name: (b.shape[0], lora_a[name].shape[1]) for name, b in factors_of(adapter, "lora_B").items()}
