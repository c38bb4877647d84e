"""
What each part of EBLoRA is worth on the digits, and what rank and threshold change, on the test split of seeds 0 to 4.

    python scripts/ablations.py benchmarks/digits

Makes the runs that `ablations.jsonl` in the folder does not hold yet, at the settings tuned for rank 4 but for what a
row says, and writes the tables of docs/what-holds.md to `ablations.md` beside it.
"""

import argparse
import os
from pathlib import Path

import numpy as np

from eblora_hf.benchmark.runs import Run, run_all
from eblora_hf.benchmark.suites import SUITES

SEEDS = range(5)
DIGITS = SUITES["digits"]
METRICS = ("MFN", "LA", "BWT", "base", "room", "megabytes")


def run_of(method: str, seed: int, rank: int = DIGITS.rank, **changes) -> Run:
    return Run("digits", method, seed, DIGITS.tasks, rank, DIGITS.tuning[method]["tuned"] | changes)


# by table and row: the method, the changes of its settings or its rank
ROWS: dict[str, dict[str, tuple[str, dict]]] = {
    "Parts": {
        "LoRA": ("lora", {}),
        "LoRA + anchor": ("lora", {"anchor": "rows"}),
        "balance (EBO)": ("ebo", {}),
        "balance + anchor": ("ebo", {"anchor": "rows"}),
        "balance + basis": ("eblora", {"penalty_weight": 0.0, "scale_lr": 0.02}),
        "balance + penalty": ("eblora", {"max_basis_fraction": 1e-9}),
        "balance + basis + penalty (the default)": ("eblora", {}),
        "balance + basis + anchor": ("eblora-anchor", {"penalty_weight": 0.0}),
        "balance + basis + penalty + anchor": ("eblora-anchor", {}),
    },
    "Rank": {
        f"{name}, r = {rank}": (method, {"rank": rank})
        for rank in (4, 16)
        for name, method in (("LoRA", "lora"), ("EBLoRA", "eblora"), ("EBLoRA + anchor", "eblora-anchor"))
    },
    "Threshold": {
        f"EBLoRA, ε = {threshold}": ("eblora", {"energy_threshold": threshold}) for threshold in (0.9, 0.97, 0.99)
    },
}


def table(title: str, rows: dict[str, list[dict]]) -> str:
    """Markdown; per row mean ± standard deviation over the seeds (n - 1 in the denominator)."""
    lines = [[title, *METRICS], ["---"] * (1 + len(METRICS))]
    for name, results in rows.items():
        values = [np.array([result[metric] for result in results]) for metric in METRICS]
        lines.append([name, *(f"{value.mean():.1f}±{value.std(ddof=1):.1f}" for value in values)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    runs = {
        title: {name: [run_of(method, seed, **changes) for seed in SEEDS] for name, (method, changes) in rows.items()}
        for title, rows in ROWS.items()
    }
    different = {str(run): run for rows in runs.values() for own in rows.values() for run in own}
    path = args.folder / "ablations.jsonl"
    results = run_all(different.values(), path, args.folder / "base_models", args.workers)
    of = dict(zip(different, results, strict=True))
    tables = [
        table(title, {name: [of[str(run)] for run in own] for name, own in rows.items()})
        for title, rows in runs.items()
    ]
    (args.folder / "ablations.md").write_text("\n".join(tables), encoding="utf-8")
    print("\n".join(tables))


if __name__ == "__main__":
    main()
