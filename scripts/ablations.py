"""
What each part of EBLoRA is worth on the digits, on the test split of seeds 0 to 4.

    python scripts/ablations.py benchmarks/digits

Makes the runs that `ablations.jsonl` in the folder does not hold yet, at the tuned settings but for what ROWS says,
and writes the table of docs/what-holds.md to `ablations.md` beside it.
"""

import argparse
import os
from pathlib import Path

import numpy as np

from eblora_hf.benchmark.runs import Run, run_all
from eblora_hf.benchmark.suites import SUITES

SEEDS = range(5)
DIGITS = SUITES["digits"]
METRICS = ("MFN", "LA", "BWT", "base")
# by row: the method, and what is changed of its settings
ROWS: dict[str, tuple[str, dict]] = {
    "LoRA": ("lora", {}),
    "LoRA + anchor": ("lora", {"anchor": "rows"}),
    "balance (EBO)": ("ebo", {}),
    "balance + anchor": ("ebo", {"anchor": "rows"}),
    "balance + penalty": ("eblora", {"max_basis_fraction": 1e-9}),
    # smaller steps of s, as `"auto"` takes them
    "balance + basis": ("eblora", {"penalty_weight": 0.0, "scale_lr": 0.02}),
    "balance + basis + penalty, the default": ("eblora", {}),
    "balance + basis + anchor": ("eblora-anchor", {"penalty_weight": 0.0}),
    "balance + basis + penalty + anchor": ("eblora-anchor", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    runs = [
        Run("digits", method, seed, DIGITS.tasks, DIGITS.rank, DIGITS.tuning[method]["tuned"] | changes)
        for method, changes in ROWS.values()
        for seed in SEEDS
    ]
    results = iter(run_all(runs, args.folder / "ablations.jsonl", args.folder / "base_models", args.workers))
    lines = [["", *METRICS], ["---"] * (1 + len(METRICS))]
    for name in ROWS:
        own = [next(results) for _ in SEEDS]
        values = [np.array([result[metric] for result in own]) for metric in METRICS]  # each over the seeds
        lines.append([name, *(f"{value.mean():.1f}±{value.std(ddof=1):.1f}" for value in values)])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    (args.folder / "ablations.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
