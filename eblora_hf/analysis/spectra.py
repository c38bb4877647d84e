"""Singular spectra of LoRA updates: how evenly the energy of ΔW = B A is spread over its directions."""

import torch

from ..composition import AdapterState, factors_of


def singular_values(adapter: AdapterState) -> dict[str, torch.Tensor]:
    """
    The r singular values of each layer's update, from the factors alone.

    With B = Q_B R_B and Aᵀ = Q_A R_A, those of B A are those of the r x r matrix R_B R_Aᵀ.

    Args:
        adapter (`dict[str, torch.Tensor]`): A folded adapter by PEFT's file names.

    Returns:
        `dict[str, torch.Tensor]`: By layer name, `(r,)` in float64, descending.
    """
    spectra, lora_a = {}, factors_of(adapter, "lora_A")
    for name, b in factors_of(adapter, "lora_B").items():
        r_b = torch.linalg.qr(b.double(), mode="r")[1]
        r_a = torch.linalg.qr(lora_a[name].double().T, mode="r")[1]
        spectra[name] = torch.linalg.svdvals(r_b @ r_a.T)
    return spectra


def mean_sigma_ratio(adapters: list[AdapterState]) -> list[float]:
    """
    σ_i / σ_1 for i = 1…r, averaged over the layers of all adapters; 1, 1, … for perfectly balanced updates.

    Raises:
        ValueError: if there is no layer with an update.
    """
    ratios = [s / s[0] for adapter in adapters for s in singular_values(adapter).values() if s[0] > 0]
    if not ratios:
        raise ValueError("None of the adapters holds an update: every lora_B is zero.")
    return torch.stack(ratios).mean(dim=0).tolist()
