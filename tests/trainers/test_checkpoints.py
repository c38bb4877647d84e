"""Checkpoints without a trainer: which one a task goes on from."""

import pytest
from transformers import TrainerState

from eblora_hf.trainers.checkpoints import (
    check_checkpoint,
    checkpoint_to_resume,
    last_complete_checkpoint,
    write_method,
)


def write_checkpoint(folder, step: int, method: str = "eblora"):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    state = TrainerState(global_step=step)
    state.save_to_json(str(checkpoint / "trainer_state.json"))
    for name in ("optimizer.pt", "scheduler.pt"):
        (checkpoint / name).write_bytes(b"")
    write_method(checkpoint, method)
    return checkpoint


def test_the_newest_complete_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, 2)
    newest = write_checkpoint(tmp_path, 10)
    assert last_complete_checkpoint(tmp_path) == str(newest)
    state = newest / "trainer_state.json"
    state.write_text(state.read_text()[:20])  # the process was killed while it wrote
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_resuming_is_asked_for_and_possible(tmp_path):
    folder = tmp_path / "checkpoints" / "one"
    with pytest.raises(ValueError, match=r"Nothing to resume: no finished task in .*no checkpoint in"):
        checkpoint_to_resume(folder, "one", True, is_first=True)
    assert checkpoint_to_resume(folder, "one", None, is_first=True) is None
    assert checkpoint_to_resume(folder, "one", True, is_first=False) is None  # begin with the unfinished task
    checkpoint = str(write_checkpoint(folder, 5))
    assert checkpoint_to_resume(folder, "one", True, is_first=True) == checkpoint
    assert checkpoint_to_resume(folder, "one", checkpoint, is_first=True) == checkpoint
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        checkpoint_to_resume(folder, "one", None, is_first=True)
    with pytest.raises(ValueError, match="is not a checkpoint of the task 'two'"):
        checkpoint_to_resume(tmp_path / "checkpoints" / "two", "two", checkpoint, is_first=True)


def test_a_checkpoint_of_another_method_or_without_its_optimizer_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 5)
    options = {"with_optimizer": True, "sharded": False}
    check_checkpoint(str(checkpoint), "eblora", **options)
    with pytest.raises(ValueError, match="with the method 'eblora', not with 'olora'"):
        check_checkpoint(str(checkpoint), "olora", **options)
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"optimizer\.pt is missing"):
        check_checkpoint(str(checkpoint), "eblora", **options)
    check_checkpoint(str(checkpoint), "eblora", with_optimizer=False, sharded=False)
