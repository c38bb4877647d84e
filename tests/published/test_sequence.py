"""The published sequence on disk: append-only, verified, and whole after a crash at any moment."""

import json
import os
import signal

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from eblora_hf import PublishedSequence
from eblora_hf.published.identity import describe_base_model
from eblora_hf.published.index import TaskRecord

from ..support.sequences import LAYER, append, new_sequence
from ..support.tiny import lora, make_model, orthonormal


def test_append_and_open(tmp_path):
    sequence = new_sequence(tmp_path)
    append(sequence, "one", 0)
    before = {path: path.read_bytes() for path in (tmp_path / "tasks").rglob("*") if path.is_file()}
    append(sequence, "two", 1)
    assert all(path.read_bytes() == data for path, data in before.items())  # append-only
    opened = PublishedSequence.open(tmp_path)
    assert opened.names == ["one", "two"]
    assert [task.folder for task in opened.tasks] == ["tasks/00-one", "tasks/01-two"]
    assert torch.equal(opened.bases()[LAYER], orthonormal(32, 12, 7, torch.float32)[:, :8])
    assert opened.tasks[1].metrics == {"two": 0.5}
    root = load_file(tmp_path / "adapter_model.safetensors")
    assert root[f"base_model.model.{LAYER}.lora_A.weight"].shape == (8, 32)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (8, 8, "LORA")
    mode = (tmp_path / "adapter_model.safetensors").stat().st_mode & 0o777
    assert mode == 0o666 & ~current_umask()
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_two_tasks_of_one_name_are_refused_and_nothing_changes(tmp_path):
    sequence = new_sequence(tmp_path)
    append(sequence, "one", 0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already has a task 'one'"):
        append(sequence, "one", 1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda f: (f / "eblora_sequence.json").unlink(), FileNotFoundError, "holds no sequence"),
        (lambda f: (f / "eblora_sequence.json").write_text("{"), ValueError, "not a readable index"),
        (lambda f: (f / "eblora_sequence.json").write_text("[]"), ValueError, "not a readable index"),
        (lambda f: edit_index(f, format_version=2), ValueError, "format version 2 is newer than 1; update eblora_hf"),
        (lambda f: edit_index(f, tasks=[{"name": "x"}]), ValueError, "not a readable index"),
        (
            lambda f: flip(f / "tasks/00-one/adapter_model.safetensors"),
            ValueError,
            "00-one/adapter_model.* was changed",
        ),
        (
            lambda f: flip(f / "adapter_model.safetensors"),
            ValueError,
            "adapter_model.safetensors of all tasks was changed",
        ),
        (lambda f: edit_index(f, tasks=[record(folder="../up-one")]), ValueError, "lies in '../up-one' instead of"),
        (lambda f: edit_index(f, tasks=[record(files={"../x": "0" * 64})]), ValueError, r"lists the files \['../x'\]"),
        (
            lambda f: edit_index(f, tasks=[record(files={"x": "0"})]),
            ValueError,
            r"tasks.0.files.x: String should match",
        ),
        (lambda f: edit_index(f, tasks=[record(files={})]), ValueError, r"lists the files \[\]"),
        (
            lambda f: edit_index(f, tasks=[record(), record(folder="tasks/01-one")]),
            ValueError,
            "lists the files|one name",
        ),
        (
            lambda f: edit_index(f, tasks=[record(name="../one")]),
            ValueError,
            "tasks.0.name: String .* got '../one'",
        ),
        (lambda f: flip(f / "tasks/00-one/training.json"), ValueError, r"00-one/training.json .* was changed"),
        (lambda f: truncate(f / "tasks/00-one/subspace.safetensors"), ValueError, r"00-one/subspace.* was changed"),
        (
            lambda f: (f / "tasks/00-one/subspace.safetensors").unlink(),
            FileNotFoundError,
            r"00-one/subspace.* is missing",
        ),
    ],
)
def test_damage_is_named(tmp_path, change, error, words):
    append(new_sequence(tmp_path), "one", 0)
    change(tmp_path)
    with pytest.raises(error, match=words):
        PublishedSequence.open(tmp_path)


def record(**changes):
    plain = {"name": "one", "folder": "tasks/00-one", "created": "", "rank": 4, "steps": 1, "metrics": {}, "files": {}}
    return plain | changes


def edit_index(folder, **changes):
    path = folder / "eblora_sequence.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def test_identity_of_a_base_model():
    bare = make_model("bert")
    described = describe_base_model(bare)
    model = get_peft_model(bare, lora(task_type="SEQ_CLS"))
    assert describe_base_model(model.get_base_model()) == described  # adapters are not part of it
    assert describe_base_model(make_model("bert", dtype=torch.bfloat16)) == described  # nor is the precision
    assert describe_base_model(make_model("bert", dtype=torch.float16))["weights"] is None
    other = describe_base_model(make_model("bert", seed=5))
    assert other["fingerprint"] == described["fingerprint"]
    assert other["weights"] != described["weights"]
    new_head = make_model("bert")
    torch.nn.init.normal_(new_head.classifier.weight)
    assert describe_base_model(new_head)["weights"] != described["weights"]
    assert describe_base_model(new_head, ["classifier"]) == describe_base_model(make_model("bert"), ["classifier"])
    assert describe_base_model(make_model("llama"))["fingerprint"] != described["fingerprint"]


def test_a_lost_index_costs_no_task(tmp_path):
    append(new_sequence(tmp_path), "one", 0)
    (tmp_path / "eblora_sequence.json").unlink()
    with pytest.raises(ValueError, match=r"holds 00-one, which the index .* does not list"):
        append(new_sequence(tmp_path), "two", 1)
    assert (tmp_path / "tasks/00-one/adapter_model.safetensors").is_file()


def test_a_full_disk_leaves_the_old_sequence(tmp_path, monkeypatch):
    sequence = new_sequence(tmp_path)
    append(sequence, "one", 0)
    real, written = os.fsync, []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        append(sequence, "two", 1)
    monkeypatch.undo()
    assert PublishedSequence.open(tmp_path).names == ["one"]
    assert sequence.names == ["one"]
    append(sequence, "two", 1)  # once there is room again
    assert PublishedSequence.open(tmp_path).names == ["one", "two"]


def append_and_die(folder, after: int) -> None:
    """Runs in a child process: kills it after so many renames and syncs, or exits with 0."""
    sequence, count = PublishedSequence.open(folder), 0

    def counted(function):
        def call(*args):
            nonlocal count
            result = function(*args)
            count += 1
            if count == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.replace, os.fsync = counted(os.replace), counted(os.fsync)
    append(sequence, "two", 1)
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("after", range(1, 27))
def test_killed_while_appending_leaves_the_old_or_the_new_sequence(tmp_path, after):
    """SIGKILL in a child process after the n-th file operation of the append, for every n."""
    append(new_sequence(tmp_path), "one", 0)
    child = os.fork()
    if child == 0:
        append_and_die(tmp_path, after)
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL if killed else os.WEXITSTATUS(status) == 0
    try:
        PublishedSequence.open(tmp_path)
    except ValueError as error:  # a reader refuses the moment between the new sum and the new index
        assert "of all tasks was changed" in str(error)  # noqa: PT017
        assert killed
    opened = PublishedSequence.open(tmp_path, repair=True)
    assert opened.names in (["one"], ["one", "two"])
    if not killed:
        assert opened.names == ["one", "two"]
    if opened.names == ["one"]:
        append(opened, "two", 1)
    assert PublishedSequence.open(tmp_path).bases()[LAYER].shape == (32, 8)
    assert load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{LAYER}.lora_A.weight"].shape == (
        8,
        32,
    )


def test_a_foreign_adapter_is_not_replaced(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds an adapter that is not of a sequence"):
        append(new_sequence(tmp_path), "one", 0)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"mine"


def test_selection():
    sequence = PublishedSequence("nowhere", {}, [TaskRecord(**record(name=n, folder=f"tasks/00-{n}")) for n in "abc"])
    assert sequence.select() == ["a", "b", "c"]
    assert sequence.select(upto="b") == ["a", "b"]
    assert sequence.select(exclude=["b"]) == ["a", "c"]
    for options in ({"upto": "x"}, {"exclude": ["x"]}, {"exclude": "ab"}):
        with pytest.raises(ValueError, match="expected names out of a, b, c"):
            sequence.select(**options)
    with pytest.raises(ValueError, match="leave none of the tasks"):
        sequence.select(upto="a", exclude=["a"])
