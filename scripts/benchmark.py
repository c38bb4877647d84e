#!/usr/bin/env python
"""Measures what eblora_hf costs: each figure is a ratio inside one run, with medians of interleaved repetitions.

    python scripts/benchmark.py --json out.json                      # everything on the CPU, about half an hour
    python scripts/benchmark.py --only step --sets 1b --rank 16 --basis 0
    python scripts/benchmark.py --device cuda --json out.json --plots .

`run` is what a user pays: whole runs of two tasks against the stock Trainer with LoRA, in processor and wall time,
with the phases of ours. `memory` is the peak of a run at the shapes of a 7B model over that of stock LoRA, and the
size of the bases on disk over the adapter's. `step` is one step of the optimizer on the factors of a layer set,
against fused and foreach AdamW, the released algorithm written anew, and geoopt's RiemannianAdam if it is installed.
`training` is what the step adds to a whole training step of plain LoRA, `basis` the update of a basis, `snapshot` its
memory and time, `sequence` the cost of a training step after 1 to 50 tasks.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from speed.basis import SHAPES, measure_basis
from speed.memory import CONTENDERS, measure_memory, with_extra
from speed.plots import plot
from speed.run import measure_run
from speed.sequence import measure_sequence
from speed.snapshot import MODES, measure_snapshot
from speed.step import measure_step
from speed.timing import SETS, machine
from speed.training import measure_training

PARTS = ("run", "memory", "step", "training", "basis", "snapshot", "sequence")
# without --rank and --basis: one of them varies at the default of the other
RANKS, WIDTHS = (16, 4, 64, 128), (0, 64, 256, 1024)
TASKS = (1, 5, 10, 20, 50)
# kind of the model, epochs of a task, tokens of a row, rows of a task, repetitions
RUNS = {
    "tiny": (("decoder", 1, 128, 256, 2), ("encoder", 1, 128, 256, 2), ("decoder", 3, 128, 128, 1)),
    "full": (
        ("decoder", 1, 128, 256, 3),
        ("encoder", 1, 128, 256, 3),
        ("decoder", 3, 128, 256, 1),
        ("decoder", 1, 2048, 64, 1),
    ),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure, all by default")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["vit", "1b", "7b"], help="layer sets")
    parser.add_argument("--rank", nargs="+", type=int, help="LoRA ranks; by default 16, and 4 to 128 for the step")
    parser.add_argument("--basis", nargs="+", type=int, help="columns of the bases; by default 0 to 1024")
    parser.add_argument("--threads", type=int, help="threads of the CPU, by default all cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the rows")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where to draw the step's and the tasks' cost")
    arguments = parser.parse_args()
    for name in ("rank", "basis"):
        if any(value < (name == "rank") for value in getattr(arguments, name) or ()):
            parser.error(f"--{name} {' '.join(map(str, getattr(arguments, name)))}: too small")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    for path in (arguments.json and arguments.json.parent, arguments.plots):
        if path is not None and not path.is_dir():  # before minutes of measuring
            parser.error(f"{path} is not a folder")
    return arguments


def measurements(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any] | None]:
    """The rows one by one, as they are measured."""
    if arguments.rank is None and arguments.basis is None:
        grid = [*((rank, 0) for rank in RANKS), *((RANKS[0], width) for width in WIDTHS[1:])]
    else:
        grid = list(itertools.product(arguments.rank or RANKS[:1], arguments.basis or WIDTHS[:1]))
    rank = (arguments.rank or RANKS)[0]
    size = "tiny" if arguments.sets == ["tiny"] else "1b" if device.type == "cuda" else "97m"
    if "run" in arguments.only:
        for kind, epochs, tokens, rows, repeat in RUNS["tiny" if size == "tiny" else "full"]:
            model = "small" if size == "tiny" else size
            yield measure_run(size, model, kind, epochs, tokens, rows, repeat, device)
    if "memory" in arguments.only:
        yield from with_extra(
            [measure_memory("tiny" if size == "tiny" else "7b", name, device) for name in CONTENDERS]
        )
    if "step" in arguments.only:
        for name, (r, p) in itertools.product(arguments.sets, grid):
            yield measure_step(name, r, p, device)
    if "training" in arguments.only:
        lengths = (16,) if size == "tiny" else (2048, 8192) if device.type == "cuda" else (512, 2048)
        for tokens, width in itertools.product(
            lengths, arguments.basis or (WIDTHS[:1] if size == "tiny" else (0, 256))
        ):
            yield measure_training(size, rank, width, tokens, device)
    if "basis" in arguments.only:
        for name in arguments.sets:
            for shape, kind in itertools.product(SHAPES[name], ("low", "high")):
                yield measure_basis(*shape, kind, device)
    if "snapshot" in arguments.only:
        for mode in MODES:
            yield measure_snapshot("tiny" if size == "tiny" else "1b", mode, device)
    if "sequence" in arguments.only:
        for tasks in TASKS[:1] if size == "tiny" else TASKS:
            yield measure_sequence(size, rank, tasks, 16 if size == "tiny" else 512, device)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one table for each part."""
    lines = []
    for _, group in itertools.groupby(rows, key=lambda row: row["what"]):
        group = list(group)
        columns = list(dict.fromkeys(key for row in group for key in row))
        lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in group]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.4g}" if abs(value) < 100 else f"{value:.0f}"


def main() -> None:
    arguments = parse_arguments()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)  # as the trainer does
    device = torch.device(arguments.device)
    rows = []
    for row in measurements(arguments, device):
        if row is None:  # no room for the basis in this set
            continue
        rows.append(row | {"device": device.type, "threads": torch.get_num_threads()})
        if arguments.json:  # what is measured so far survives
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(", ".join(f"{key}: {value}" for key, value in machine(device).items()))
    print(table(rows))
    if arguments.plots:
        plot(rows, arguments.plots)


if __name__ == "__main__":
    main()
