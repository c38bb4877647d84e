"""The tables of docs/support.md: written by the tests that ran, and compared with what tests find ever after."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from .architectures import ARCHITECTURES
from .contract import PRECISIONS

PATH = Path(__file__).parents[2] / "docs" / "support.md"
COMMAND = (
    "bash scripts/test.sh tests/trainers/test_support.py tests/trainers/test_support_tasks.py "
    "tests/manifold/test_optimizers.py tests/trainers/test_features.py -m 'slow or not slow' --write-support"
)
WORKS = "works"
TABLES = {
    "python": "One process",
    "torchrun": "DistributedDataParallel",
    "FSDP2": "FSDP2",
    "FSDP1": "FSDP1",
    "DeepSpeed": "DeepSpeed, any stage",
    "preferences": "Preferences and rewards (one process)",
    "heads": "Heads (one process)",
    "optimizers": "Optimizers",
    "features": "Features of the trainers",
    "packing": "Packing (SFTTrainer)",
}
ROWS = {name: f"{name}: {architecture.trainer}" for name, architecture in ARCHITECTURES.items()}
_HEAD = f"""# What works

Written by the tests that ran:

```bash
{COMMAND}
```

Every cell is *works* (two tasks learnt, the constraints kept, published and loaded by stock PEFT with the same
outputs) or *refused* with the message a user gets. All of it ran on a CPU; on a GPU **everything is untested here**.
The models are tiny ones from config. DistributedDataParallel and FSDP2 ran in two processes over gloo, started by
`torchrun`; `accelerate launch` sets the same environment. On a CPU accelerate itself takes neither FSDP2 nor the fp16
scaler: the tests tell it to, and it takes the path of a GPU run from there on.
"""


def outcome(run: Callable[[], object]) -> str:
    """What becomes of a combination: it works, or is refused with a reason."""
    try:
        run()
    except (TypeError, ValueError) as error:
        return str(error)
    return WORKS


def report(record_property: Callable, table: str, row: str, column: str, result: str) -> None:
    """Records a cell for the document, and compares it with the document that is there."""
    record_property("support", json.dumps([table, row, column, result]))
    written = read().get((table, row, column))
    if written is not None:
        found = WORKS if result == WORKS else "refused"
        assert found == written, f"{table}, {row}, {column}: {PATH.name} says {written}, but: {result}"


def read() -> dict[tuple[str, str, str], str]:
    """The cells of the document, with *refused* for whatever reason; empty if there is none."""
    cells, table, columns = {}, "", []
    for line in PATH.read_text().splitlines() if PATH.is_file() else ():
        if line.startswith("## "):
            table, columns = line.removeprefix("## "), []
        elif line.startswith("| ") and not columns:
            columns = [column.strip() for column in line.strip("|").split("|")][1:]
        elif line.startswith("| "):
            row, *values = [value.strip() for value in line.strip("|").split("|")]
            cells |= {(table, row, c): v.partition(" [")[0] for c, v in zip(columns, values, strict=True)}
    return cells


def position(cell: tuple[str, str, str, str]) -> tuple:
    """Where a cell belongs in the document."""
    table, row, column, _ = cell
    rows = list(ROWS.values())
    columns = [*PRECISIONS, "Trainer", "Seq2SeqTrainer", "SFTTrainer"]
    return (
        list(TABLES.values()).index(table),
        rows.index(row) if row in rows else len(rows),
        row,
        columns.index(column) if column in columns else len(columns),
    )


def render(cells: Iterable[tuple[str, str, str, str]]) -> str:
    """The document: a table for each name, and the reasons as footnotes."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for table, row, column, result in sorted(cells, key=position):
        tables.setdefault(table, {}).setdefault(row, {})[column] = result
    reasons: list[str] = []
    parts = [_HEAD]
    for table, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines = [f"## {table}", "", f"|  | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
        for row, results in rows.items():
            lines.append(f"| {row} | {' | '.join(_cell(results[column], reasons) for column in columns)} |")
        parts.append("\n".join(lines) + "\n")
    if reasons:
        parts.append("## Reasons\n\n" + "\n".join(f"[{n}] {reason}\n" for n, reason in enumerate(reasons, start=1)))
    return "\n".join(parts)


def _cell(result: str, reasons: list[str]) -> str:
    if result == WORKS:
        return result
    reason = " ".join(result.split())
    if reason not in reasons:
        reasons.append(reason)
    return f"refused [{reasons.index(reason) + 1}]"
