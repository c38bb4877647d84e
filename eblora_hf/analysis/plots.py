"""Plots of spectra and of the merging experiment."""

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.figure
from matplotlib.ticker import MaxNLocator

from ..adapters.spectra import Spectrum

if TYPE_CHECKING:  # a plot of spectra needs no trainer
    from ..benchmark.merging_experiment import MeanAndDeviation


def plot_spectra(spectra: dict[str, Spectrum], path: Path) -> None:
    """Draws σ_i / σ_1 over i, one line per adapter."""
    figure = matplotlib.figure.Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    for name, spectrum in spectra.items():
        axis.plot(range(1, len(spectrum.sigma_ratio) + 1), spectrum.sigma_ratio, marker="o", markersize=3, label=name)
    axis.set_xlabel("i")
    axis.set_ylabel("σᵢ / σ₁, mean over layers")
    axis.set_ylim(0, 1.05)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def plot_merging(table: dict[tuple[int, str], dict[str, "MeanAndDeviation"]], path: Path) -> None:
    """Draws the normalised accuracy index by number of adapters and variant: at weight 1, and with tuned weight."""
    figure = matplotlib.figure.Figure(figsize=(8.4, 3.8), layout="constrained")
    counts, variants = (list(dict.fromkeys(key)) for key in zip(*table, strict=True))
    titles = {"nai": "weight 1", "tuned_nai": "weight tuned on validation"}
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for offset, variant in enumerate(variants, start=-1):
            values = [table[count, variant][key] for count in counts]
            axis.bar(
                [position + 0.27 * offset for position in range(len(counts))],
                [value.mean for value in values],
                width=0.25,
                yerr=[value.deviation or 0.0 for value in values],
                capsize=3,
                label=variant,
            )
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(counts)), [str(count) for count in counts])
        axis.set_xlabel("adapters merged")
    axes[0].set_ylabel("normalised accuracy index in percent")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
