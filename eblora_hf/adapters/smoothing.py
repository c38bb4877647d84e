"""Smoothing: a trained update with all its singular values made equal and its directions kept (arXiv 2602.00722)."""

import torch

from .factors import decompose_product
from .states import AdapterState, factor_key, factors_of, in_full

EQUAL = ("sum", "frobenius")


def smooth_adapter(adapter: AdapterState, equal: str = "sum") -> AdapterState:
    """
    Replaces the singular values of each layer's update by their mean: ΔW = U diag(σ) Vᵀ becomes σ̄ U Vᵀ.

    The k directions with σ_i > σ_1 · r · ε, where ε is the rounding of float32, are those that the update has; the
    others are rounding error, take no part in the mean and stay zero, as does a layer without an update. Scaling the
    factors scales σ̄ alike, so the adapter need not be folded: what `peft.get_peft_model_state_dict` returns will do.

    Args:
        adapter (`dict[str, torch.Tensor]`): An adapter by PEFT's file names.
        equal (`str`, defaults to `"sum"`): What is kept. `"sum"`: Σ σ_i, with σ̄ the mean σ; `"frobenius"`: ‖ΔW‖, with
            σ̄ their root mean square.

    Returns:
        `dict[str, torch.Tensor]`: Of the same ranks, in float32 or wider; A holds Vᵀ and B holds σ̄ U. Whatever else
            is in the adapter stays as it is.

    Raises:
        ValueError: for another `equal`.

    Example:

    >>> key = "base_model.model.layer.lora_{}.weight"
    >>> adapter = {key.format("A"): torch.eye(2), key.format("B"): torch.diag(torch.tensor([3.0, 1.0]))}
    >>> smooth = smooth_adapter(adapter)
    >>> torch.allclose(smooth[key.format("B")] @ smooth[key.format("A")], 2.0 * torch.eye(2))  # Σσ is still 4
    True
    """
    if equal not in EQUAL:
        raise ValueError(f"equal={equal!r}: expected one of {', '.join(EQUAL)}.")
    smoothed, lora_a = dict(adapter), factors_of(adapter, "lora_A")
    for name, b in factors_of(adapter, "lora_B").items():
        a = in_full(lora_a[name])
        new_b, new_a = torch.zeros_like(in_full(b)), torch.zeros_like(a)
        u, sigma, vt = decompose_product(b, a)
        kept = int((sigma > sigma[0] * len(a) * torch.finfo(torch.float32).eps).sum())
        if kept > 0:
            mean = sigma[:kept].mean() if equal == "sum" else sigma[:kept].square().mean().sqrt()
            new_b[:, :kept], new_a[:kept] = mean * u[:, :kept], vt[:kept]
        smoothed[factor_key(name, "lora_A")], smoothed[factor_key(name, "lora_B")] = new_a, new_b
    return smoothed
