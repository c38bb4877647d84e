"""The `eblora` command, but for demo, benchmark and analyze."""

import shutil

from typer.testing import CliRunner

from eblora_hf import PublishedSequence
from eblora_hf.cli import app
from eblora_hf.published.locks import one_writer

from .support.children import run_in_child
from .support.sequences import append, new_sequence


def repair(folder):
    return CliRunner().invoke(app, ["repair", str(folder)])


def test_repair_moves_what_the_index_does_not_list(tmp_path):
    sequence = new_sequence(tmp_path)
    append(sequence, "one", 0)
    for name in ("01-two", "01-three"):
        shutil.copytree(tmp_path / "tasks/00-one", tmp_path / "tasks" / name)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut off")
    first = repair(tmp_path)
    assert first.exit_code == 0, first.output
    assert "set-aside/01-two" in first.output.replace("\n", "")
    assert "is in order: one" in first.output.replace("\n", "")
    assert (tmp_path / "set-aside/01-three/adapter_model.safetensors").is_file()
    append(PublishedSequence.open(tmp_path), "four", 1)
    shutil.copytree(tmp_path / "tasks/00-one", tmp_path / "tasks/01-two")
    assert repair(tmp_path).exit_code == 0
    assert (tmp_path / "set-aside/01-two.2").is_dir()  # beside the first, not over it
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "Moved" not in repair(tmp_path).output
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_repair_of_a_folder_whose_index_is_lost(tmp_path):
    append(new_sequence(tmp_path), "one", 0)
    for path in tmp_path.glob("*.json"):
        path.unlink()
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "is in order: no task" in repair(tmp_path).output.replace("\n", "")
    append(new_sequence(tmp_path), "two", 0)
    assert PublishedSequence.open(tmp_path).names == ["two"]


def test_repair_refuses_what_it_cannot_mend(tmp_path):
    assert "is not a folder" in repair(tmp_path / "nothing").output
    append(new_sequence(tmp_path), "one", 0)
    with one_writer(tmp_path, "run"):
        assert run_in_child(lambda: exits_with(repair(tmp_path), 1, "Another process is writing")) == 0
    (tmp_path / "tasks/00-one/training.json").write_text("{}")
    exits_with(repair(tmp_path), 1, "was changed after it was published")


def exits_with(result, code, words):
    assert result.exit_code == code
    assert words in result.output.replace("\n", " ")
