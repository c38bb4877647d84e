"""`scripts/benchmark.py` measures every part and writes what it says; how fast anything is is no matter for a test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_every_part_is_measured_and_written(tmp_path):
    parts = ("memory", "step", "training", "basis", "snapshot", "sequence")
    options = ("--sets", "tiny", "--json", "rows.json", "--plots", ".", "--threads", "1")
    result = run("--only", *parts, *options, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    by_part = {}
    for row in rows:
        by_part.setdefault(row["what"], []).append(row)
    assert list(by_part) == list(parts)
    assert [row["contender"] for row in by_part["memory"]] == ["lora", "ours"]
    assert all(row["bases_over_adapter"] <= 4.1 for row in by_part["memory"][1:])
    assert [(row["rank"], row["basis"]) for row in by_part["step"]] == [(16, 0), (4, 0)]  # others leave no room
    for row in by_part["step"]:
        assert row["ours_over_adamw_fused"] == pytest.approx(row["ours_ms"] / row["adamw_fused_ms"])
        assert row["released_over_ours"] == pytest.approx(row["released_ms"] / row["ours_ms"])
        assert row["orthonormality"] < 2e-6
    assert all(row["captured"] >= 0.99 for row in by_part["basis"])
    assert len(by_part["snapshot"]) == 6
    assert (tmp_path / "step.png").stat().st_size > 1000
    assert (tmp_path / "sequence.png").stat().st_size > 1000
    for row in rows:
        assert row["device"] == "cpu"
        assert f"| {row['what']} |" in result.stdout


RUN = """
import json, torch
from speed.run import measure_run
rows = [measure_run("tiny", "tiny", kind, 1, 16, 16, 1, torch.device("cpu")) for kind in ("decoder", "encoder")]
print(json.dumps(rows))
"""


def test_a_whole_run_is_measured_with_its_phases(tmp_path):
    """Of the smallest model; what `--only run` takes is worth minutes."""
    result = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, cwd=ROOT / "scripts")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])
    for row, kind in zip(rows, ("decoder", "encoder"), strict=True):
        assert (row["what"], row["set"], row["kind"], row["epochs"]) == ("run", "tiny", kind, 1)
        assert row["run_over_lora"] == pytest.approx(row["ours_s"] / row["lora_s"])
        phases = ("start_snapshot", "training", "observation", "decomposition", "append")
        assert all(row[f"{phase}_s"] > 0 for phase in phases)
        assert row["end_snapshot_s"] == 0  # the basis was observed
        assert (
            sum(value for key, value in row.items() if key.endswith("_s") and key not in ("ours_s", "lora_s"))
            <= (row["ours_s"])
        )


def test_one_step_alone(tmp_path):
    result = run(
        *("--only", "step", "--sets", "tiny", "--rank", "4", "--basis", "8", "16", "--json", "rows.json"),
        folder=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["what"], row["rank"], row["basis"]) for row in rows] == [("step", 4, 8), ("step", 4, 16)]
    assert all(row["restriction"] < 2e-7 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cuda"], "torch sees no GPU here"),
        (["--rank", "0"], "--rank 0: too small"),
        (["--json", "nowhere/rows.json"], "nowhere is not a folder"),
        (["--sets", "13b"], "invalid choice: '13b'"),
    ],
)
def test_wrong_arguments_end_at_once(tmp_path, arguments, words):
    result = run(*arguments, folder=tmp_path)
    assert result.returncode == 2
    assert words in result.stderr


def test_the_readme_quotes_the_committed_rows():
    """The table of the README is what its commands have written."""
    rows = [
        row
        for name in ("cpu", "cpu-7b")
        for row in json.loads((ROOT / "benchmarks" / "speed" / f"{name}.json").read_text())
        if row["what"] == "step"
    ]
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(("| vit |", "| 1b |", "| 7b |"))] == [
        f"| {row['set']} | {row['rank']} | {row['basis']} | {row['ours_over_adamw_fused']:.1f} | "
        f"{row['adamw_foreach_over_adamw_fused']:.1f} | {row['products_over_adamw_fused']:.1f} | "
        f"{row['released_over_ours']:.1f} |"
        for row in rows
    ]


def test_the_committed_bases_hold_what_was_asked():
    rows = json.loads((ROOT / "benchmarks" / "speed" / "cpu-basis.json").read_text())
    for row in rows:
        assert row["captured"] >= row["asked"]
        assert row["reported"] == pytest.approx(row["captured"], abs=1e-6)
        assert row["fewest_columns"] <= row["columns"] <= row["fewest_columns"] + 1
