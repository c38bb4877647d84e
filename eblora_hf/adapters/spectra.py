"""Singular spectra of LoRA updates: how evenly the energy of ΔW = B A is spread over its directions."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from .factors import decompose_product
from .states import AdapterState, factors_of


@dataclass(frozen=True)
class Spectrum:
    """
    The spectrum of one update, or the mean of several.

    Args:
        sigma_ratio (`list[float]`): σ_i / σ_1; 1, 1, … for a perfectly balanced update.
        top_energy (`float`): σ_1² / Σ σ_i², the share of the energy in the first direction; 1 / r when balanced.
        effective_rank (`float`): exp(-Σ p_i ln p_i) with p_i = σ_i / Σ σ_j (Roy and Vetterli 2007, "The effective
            rank"); r when balanced, 1 for a single direction.
    """

    sigma_ratio: list[float]
    top_energy: float
    effective_rank: float


def singular_values(adapter: AdapterState) -> dict[str, torch.Tensor]:
    """
    The r singular values of each layer's update.

    Args:
        adapter (`dict[str, torch.Tensor]`): A folded adapter by PEFT's file names.

    Returns:
        `dict[str, torch.Tensor]`: By layer name, `(r,)` in float64, descending.
    """
    lora_a = factors_of(adapter, "lora_A")
    return {name: decompose_product(b, lora_a[name])[1] for name, b in factors_of(adapter, "lora_B").items()}


def summarise(spectra: list[torch.Tensor]) -> Spectrum:
    """
    Averages the spectra of some layers. A layer without an update does not count, and where ranks differ, σ_i / σ_1
    is the mean over the layers that have an i-th direction.

    Args:
        spectra (`list[torch.Tensor]`): Singular values of each layer, `(r,)`, descending.

    Raises:
        ValueError: if no layer has an update.
    """
    spectra = [sigma for sigma in spectra if sigma[0] > 0]
    if not spectra:
        raise ValueError("None of the adapters holds an update: every lora_B is zero.")
    ratios = pad_sequence([sigma / sigma[0] for sigma in spectra], batch_first=True, padding_value=torch.nan)
    energies = torch.stack([sigma[0].square() / sigma.square().sum() for sigma in spectra])
    entropies = torch.stack([torch.special.entr(sigma / sigma.sum()).sum() for sigma in spectra])
    return Spectrum(ratios.nanmean(dim=0).tolist(), energies.mean().item(), entropies.exp().mean().item())


def mean_sigma_ratio(adapters: list[AdapterState]) -> list[float]:
    """
    σ_i / σ_1 for i = 1…r, averaged over the layers of all adapters; 1, 1, … for perfectly balanced updates.

    Raises:
        ValueError: if there is no layer with an update.
    """
    return summarise([sigma for adapter in adapters for sigma in singular_values(adapter).values()]).sigma_ratio
