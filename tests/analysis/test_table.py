"""`eblora table`: the numbers of a benchmark out of published sequences."""

import json

import pytest
from typer.testing import CliRunner

from eblora_hf.analysis.table import as_markdown, benchmark_table
from eblora_hf.cli import app

from ..support.sequences import adapter, append, new_sequence
from ..support.tiny import lora

ROWS = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.5, 0.6, 0.7]]


def published(folder, rows, own=None, names=("a", "b", "c")):
    """A sequence on disk with these rows of the matrix; `own` are those with each task's own head."""
    sequence = new_sequence(folder)
    for i, name in enumerate(names):
        append(sequence, name, i)
    index = json.loads((folder / "eblora_sequence.json").read_text())
    for i, task in enumerate(index["tasks"]):
        shown = dict(zip(names, rows[i], strict=True)) if rows else {}
        task["metrics"] = shown if own is None else dict(zip(names, own[i], strict=True))
        if own is not None:
            task["root_metrics"] = shown
    (folder / "eblora_sequence.json").write_text(json.dumps(index))
    return folder


def test_the_numbers_by_hand(tmp_path):
    table = benchmark_table([published(tmp_path / "one", ROWS)])
    assert (table["tasks"], table["runs"]) == (["a", "b", "c"], 1)
    rows = {name: pytest.approx(values[0], nan_ok=True) for name, values in table["rows"].items()}
    assert rows["Last"] == [50, 60, 70, 60]
    assert rows["Avg"] == [70, 160 / 3, 110 / 3, 160 / 3]
    assert table["rows"]["Transfer"][0][0] is None
    assert table["rows"]["Transfer"][0][1:] == pytest.approx([20, 20, 20])  # c: the mean of 10 and 30
    assert set(rows) == {"Last", "Avg", "Transfer"}
    means = {name: values[0] for name, values in table["means"].items()}
    expected = {
        "MFN": 60,
        "MAA": (90 + 75 + 60) / 3,
        "BWT": (-40 - 20) / 2,
        "FWT over pairs": 20,
        "FWT over tasks": 20,
    }
    assert means == pytest.approx(expected)


def test_pairs_and_tasks_are_two_means(tmp_path):
    rows = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.1], [0.5, 0.6, 0.7]]
    means = benchmark_table([published(tmp_path, rows)])["means"]
    assert means["FWT over pairs"] == pytest.approx([40 / 3])  # 20, 10, 10
    assert means["FWT over tasks"] == pytest.approx([15])  # 20 for b, 10 for c


def test_seeds_zero_shot_and_the_newest_head(tmp_path):
    better = [[value + 0.1 for value in row] for row in ROWS]
    folders = [published(tmp_path / str(i), rows, own=better) for i, rows in enumerate((ROWS, better))]
    for i, folder in enumerate(folders):
        (folder / "zero_shot.json").write_text(json.dumps({"a": 0.1 * i, "b": 0.2, "c": 0.3}))
    table = benchmark_table(folders)
    assert table["rows"]["zero-shot"] == [pytest.approx([0, 20, 30, 50 / 3]), pytest.approx([10, 20, 30, 20])]
    text = as_markdown(table)
    assert "| Last | 55.0±7.1 | 65.0±7.1 | 75.0±7.1 | 65.0±7.1 |" in text  # 50 and 60: sd √50
    assert "| zero-shot | 5.0±7.1 | 20.0±0.0 | 30.0±0.0 | 18.3±2.4 |" in text
    assert "| MFN | MAA | BWT | FWT over pairs | FWT over tasks |" in text
    assert "| 65.0±7.1 |" in text.splitlines()[-1]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_task_that_was_not_measured_leaves_the_means_void(tmp_path, missing):
    """Whichever it is: a mean over the others would be of another benchmark."""
    rows = [[value for i, value in enumerate(row) if i != missing] for row in ROWS]
    names = [name for i, name in enumerate("abc") if i != missing]
    folder = published(tmp_path, ROWS)
    index = json.loads((folder / "eblora_sequence.json").read_text())
    for task, row in zip(index["tasks"], rows, strict=True):
        task["metrics"] = dict(zip(names, row, strict=True))
    (folder / "eblora_sequence.json").write_text(json.dumps(index))
    table = benchmark_table([folder])
    assert table["rows"]["Last"][0][missing] is None
    assert table["rows"]["Last"][0][-1] is None
    assert set(map(tuple, table["means"].values())) == {(None,)}


def test_what_does_not_belong_together_is_refused(tmp_path):
    one, two = published(tmp_path / "1", ROWS), published(tmp_path / "2", ROWS, names=("a", "b", "d"))
    with pytest.raises(ValueError, match=r"2 has learnt a, b, d; expected a, b, c, the tasks of .*1"):
        benchmark_table([one, two])
    with pytest.raises(ValueError, match=r"expected imagenet-r, arxivqa.*the tasks of ucit"):
        benchmark_table([one], "ucit")
    three = published(tmp_path / "three", ROWS)
    (three / "zero_shot.json").write_text('{"a": 0.1, "b": 0.2, "c": 0.3}')
    with pytest.raises(ValueError, match=r"1 has no zero_shot\.json, but others have"):
        benchmark_table([one, three])
    loss = new_sequence(tmp_path / "loss")
    loss.append(
        "a", adapter(0), lora(target_modules=["query"]), None, steps=5, metrics={"a": 2.5}, training={"metric": "loss"}
    )
    with pytest.raises(ValueError, match=r"loss has of its tasks is the loss"):
        benchmark_table([tmp_path / "loss"])
    (one / "zero_shot.json").write_text('{"a": "high"}')
    with pytest.raises(ValueError, match=r"zero_shot\.json is not the accuracies"):
        benchmark_table([one])
    with pytest.raises(ValueError, match=r"Nothing of .*3 was measured"):
        benchmark_table([published(tmp_path / "3", None)])


def test_the_command(tmp_path):
    folder, run = published(tmp_path / "one", ROWS), CliRunner().invoke
    done = run(app, ["table", str(folder), "--json", str(tmp_path / "table.json")])
    assert done.exit_code == 0, done.output
    assert "| Last | 50.0 | 60.0 | 70.0 | 60.0 |" in done.output
    assert json.loads((tmp_path / "table.json").read_text())["means"]["MFN"] == [pytest.approx(60)]
    wrong = run(app, ["table", str(folder), "--benchmark", "ucit"])
    assert (wrong.exit_code, "the tasks of ucit" in wrong.output) == (1, True)
    assert run(app, ["table", str(folder), "--benchmark", "ucitt"]).exit_code == 2
    assert run(app, ["table", str(tmp_path / "nowhere")]).exit_code == 1
