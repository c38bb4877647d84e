"""
Does balancing the spectra of independently trained adapters help to merge them? The experiment of arXiv 2602.00722 on
the embedded benchmark.
"""

import copy
import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..adapters.merging import merge_adapters
from ..adapters.states import AdapterState, factors_of
from ..config import EBLoRAConfig
from .digits import Digits, DigitsDataset, load_digits, pretrain, steady_cpu
from .protocol import quiet, train, training_arguments
from .suites import SUITES
from .transformations import PROTOCOL_TASKS, transformation

VARIANTS = {"raw": "none", "equal sum": "sum", "equal Frobenius": "frobenius"}  # as `smooth` of merge_adapters
WEIGHTS = [round(0.1 * step, 1) for step in range(1, 16)]


@dataclass(frozen=True)
class Merge:
    """
    How good one merge is. NAI, the normalised accuracy index, is the mean over the merged tasks of the merged model's
    accuracy over that of the task's own adapter, in percent, on the test split.

    Args:
        seed (`int`): Seed of data, base model and training.
        count (`int`): Number n of adapters merged, the first n tasks of the benchmark.
        variant (`str`): One of `VARIANTS`.
        nai (`float`): At weight 1.
        tuned_weight (`float`): The weight out of `WEIGHTS` of the highest NAI on the validation split.
        tuned_nai (`float`): At that weight.
    """

    seed: int
    count: int
    variant: str
    nai: float
    tuned_weight: float
    tuned_nai: float


@dataclass(frozen=True)
class MeanAndDeviation:
    """Mean over seeds, and the standard deviation of a sample (n - 1); `None` for a single seed."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.deviation is None else f"{self.mean:.1f} ± {self.deviation:.1f}"


def run_seed(seed: int, counts: list[int], progress: Callable[[str], None] = lambda message: None) -> list[Merge]:
    """
    Trains one LoRA per task, each from the base model, and merges the first n of them in every variant.

    Args:
        seed (`int`): Seed of data split, base model and training.
        counts (`list[int]`): Numbers n of adapters to merge, between 1 and the number of tasks.
        progress (`Callable`): Called with what is done next.

    Returns:
        `list[Merge]`: By count and variant.
    """
    with steady_cpu():
        progress(f"seed {seed}: pre-training")
        splits = load_digits(seed)
        base = pretrain(seed, splits["train"])
        names = PROTOCOL_TASKS[: max(counts)]
        adapters = []
        for index, name in enumerate(names):
            progress(f"seed {seed}: training {name}")
            data = splits["train"].transformed(transformation(name))
            adapters.append(_train(base, data, name, seed + index))  # initialised apart from each other
        progress(f"seed {seed}: merging")
        measures = {
            split: NormalisedAccuracy(base, splits[split], dict(zip(names, adapters, strict=True)))
            for split in ("validation", "test")
        }
        return [_merge(measures, adapters[:count], seed, variant) for count in counts for variant in VARIANTS]


def over_seeds(merges: list[Merge]) -> dict[tuple[int, str], dict[str, MeanAndDeviation]]:
    """`nai`, `tuned_nai` and `tuned_weight` over all seeds, by count and variant."""
    groups: dict[tuple[int, str], list[Merge]] = {}
    for merge in merges:
        groups.setdefault((merge.count, merge.variant), []).append(merge)
    return {
        key: {
            field: _over_seeds([getattr(merge, field) for merge in group])
            for field in ("nai", "tuned_weight", "tuned_nai")
        }
        for key, group in groups.items()
    }


def _over_seeds(values: list[float]) -> MeanAndDeviation:
    return MeanAndDeviation(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Gain:
    """
    What a variant gains over raw adapters, seed by seed, in points.

    Args:
        mean (`float`): Over the seeds.
        low, high (`float`, *optional*): The 95 % confidence interval of the mean, by Student's t; `None` for one seed.
    """

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" if self.low is None else f"{self.mean:+.1f} ({self.low:+.1f} … {self.high:+.1f})"


def gains(merges: list[Merge]) -> dict[tuple[int, str], dict[str, Gain]]:
    """[`Gain`] of `nai` and `tuned_nai` by count and variant other than raw."""
    of = {(merge.seed, merge.count, merge.variant): merge for merge in merges}
    seeds = list(dict.fromkeys(merge.seed for merge in merges))
    return {
        (count, variant): {
            field: _gain([getattr(of[s, count, variant], field) - getattr(of[s, count, "raw"], field) for s in seeds])
            for field in ("nai", "tuned_nai")
        }
        for count, variant in dict.fromkeys((merge.count, merge.variant) for merge in merges)
        if variant != "raw"
    }


def _gain(differences: list[float]) -> Gain:
    from scipy.stats import t

    mean, count = statistics.mean(differences), len(differences)
    if count == 1:
        return Gain(mean, None, None)
    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5
    return Gain(mean, mean - half, mean + half)


class NormalisedAccuracy:
    """
    The normalised accuracy index on one split.

    Args:
        base (`nn.Module`): The base model.
        split ([`Digits`]): Upright digits, which each task transforms.
        adapters (`dict[str, dict]`): The own adapter of each task, folded, by the task's name.
    """

    def __init__(self, base: nn.Module, split: Digits, adapters: dict[str, AdapterState]):
        self.base = base
        self.data = {name: split.transformed(transformation(name)) for name in adapters}
        self.own = {name: self._accuracy(name, updates_of(adapter), 1.0) for name, adapter in adapters.items()}

    def __call__(self, deltas: dict[str, torch.Tensor], weight: float, count: int) -> float:
        """The index, in percent, of the base model plus `weight` times an update, over the first `count` tasks."""
        names = list(self.own)[:count]
        return 100.0 * statistics.mean(self._accuracy(name, deltas, weight) / self.own[name] for name in names)

    @torch.no_grad()
    def _accuracy(self, name: str, deltas: dict[str, torch.Tensor], weight: float) -> float:
        images, labels = self.data[name].tensors
        weights = {
            f"{layer}.weight": self.base.get_parameter(f"{layer}.weight") + weight * delta
            for layer, delta in deltas.items()
        }
        logits = torch.func.functional_call(self.base, weights, kwargs={"pixel_values": images}).logits
        return (logits.argmax(-1) == labels).double().mean().item()


def updates_of(adapter: AdapterState) -> dict[str, torch.Tensor]:
    """ΔW `(d_out, d_in)` by layer name."""
    lora_a = factors_of(adapter, "lora_A")
    return {name: b @ lora_a[name] for name, b in factors_of(adapter, "lora_B").items()}


def _merge(measures: dict[str, NormalisedAccuracy], adapters: list[AdapterState], seed: int, variant: str) -> Merge:
    deltas, count = updates_of(merge_adapters(adapters, smooth=VARIANTS[variant])), len(adapters)
    tuned = max(WEIGHTS, key=lambda weight: measures["validation"](deltas, weight, count))
    nai, tuned_nai = (measures["test"](deltas, weight, count) for weight in (1.0, tuned))
    return Merge(seed, count, variant, nai, tuned, tuned_nai)


def _train(base: nn.Module, data: DigitsDataset, name: str, seed: int) -> AdapterState:
    """The adapter of one task, trained as the benchmark's sequential LoRA trains its first."""
    with quiet(), tempfile.TemporaryDirectory() as folder:
        suite = SUITES["digits"]
        args = dataclasses.replace(training_arguments(folder, seed), **suite.tuning["lora"]["tuned"])
        config = EBLoRAConfig(method="lora")
        trainer = train(copy.deepcopy(base), args, {name: data}, config=config, rank=suite.rank)
        return trainer.begun.sequence.adapters()[0]
