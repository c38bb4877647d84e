"""`eblora show`: a sequence at a glance."""

import json

import pytest
from typer.testing import CliRunner

from eblora_hf import EBLoRAConfig
from eblora_hf.analysis.overview import describe_sequence
from eblora_hf.cli import app
from eblora_hf.published.sequence import PublishedSequence

from ..support.sequences import append, new_sequence
from ..support.trainers import make_trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two tasks by the real trainer, evaluated."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(folder, eblora_config=EBLoRAConfig(energy_threshold=0.9))
    trainer.eval_dataset = {task.name: task.train_dataset for task in trainer.tasks}
    trainer.compute_metrics = lambda prediction: {
        "accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
    }
    trainer.train()
    return folder, trainer


def test_it_says_what_the_trainer_has_done(trained):
    folder, trainer = trained
    described = describe_sequence(PublishedSequence.open(folder))
    assert [(task["name"], task["method"], task["rank"]) for task in described["tasks"]] == [
        ("one", "eblora", 4),
        ("two", "eblora", 4),
    ]
    assert [task["steps"] for task in described["tasks"]] == [trainer.args.max_steps] * 2
    assert described["matrix"] == trainer.accuracy_matrix.tolist()
    assert described["metrics"]["BWT"] == pytest.approx(trainer.continual_metrics()["BWT"])
    bases = trainer.task_callback.bases
    free = [1 - basis.shape[1] / basis.shape[0] for basis in bases.values()]
    assert described["room"]["mean"] == pytest.approx(sum(free) / len(free))
    assert described["room"]["least"] == pytest.approx(min(free))
    assert sum(task["columns"] for task in described["tasks"]) == sum(basis.shape[1] for basis in bases.values())
    assert described["root_rank"] == 8
    published = [
        path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json") and "tasks" in str(path)
    ]
    root = [folder / "adapter_model.safetensors", folder / "adapter_config.json"]
    assert described["megabytes"] == pytest.approx(sum(path.stat().st_size for path in published + root) / 1e6)


def test_the_command_prints_it_and_json_for_machines(trained):
    folder, _ = trained
    shown = CliRunner().invoke(app, ["show", str(folder)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    for part in ("after two", "mean accuracy after the last task", "are in no basis on average", "root adapter 8"):
        assert part in shown.output
    machine = CliRunner().invoke(app, ["show", str(folder), "--json"])
    described = describe_sequence(PublishedSequence.open(folder))
    assert json.loads(machine.output) == described


def test_what_is_not_there_is_not_made_up(tmp_path):
    """Nothing measured, and bases that lie elsewhere."""
    sequence = new_sequence(tmp_path)
    append(sequence, "a", 0)
    index = json.loads((tmp_path / "eblora_sequence.json").read_text())
    index["tasks"][0]["metrics"], index["bases"] = {}, "withheld"
    (tmp_path / "eblora_sequence.json").write_text(json.dumps(index))
    (tmp_path / "tasks/00-a/subspace.safetensors").unlink()
    described = describe_sequence(PublishedSequence.open(tmp_path))
    assert (described["matrix"], described["metrics"], described["room"]) == (None, None, None)
    shown = CliRunner().invoke(app, ["show", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "not known here (bases: withheld)" in shown.output
    assert "nan" not in shown.output


def test_what_is_no_sequence_or_was_changed_is_an_error(tmp_path):
    wrong = CliRunner().invoke(app, ["show", str(tmp_path)])
    assert wrong.exit_code == 1
    assert "holds no sequence" in wrong.output
    append(new_sequence(tmp_path), "a", 0)
    path = tmp_path / "tasks/00-a/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    wrong = CliRunner().invoke(app, ["show", str(tmp_path)])
    assert wrong.exit_code == 1
    assert "00-a" in wrong.output
