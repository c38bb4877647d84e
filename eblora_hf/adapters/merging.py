"""Merging adapters: their weighted sum as one adapter, exactly, smoothed before if wanted."""

import math

from .composition import concatenate
from .smoothing import smooth_adapter
from .states import AdapterState, factor_key, factors_of


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
