"""Checkpoints of a task that is not finished yet: which of them to go on from, and what of ours lies in them."""

import json
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..published.files import json_bytes, write

METHOD_FILE = "eblora_method.json"  # beside each checkpoint
TRAINED_FILE = "eblora_trained.json"  # beside the one of a task whose training has ended


def last_complete_checkpoint(folder: Path) -> str | None:
    """
    The newest checkpoint in a folder that was written to its end: `trainer_state.json`, written last, can be read.

    `transformers.trainer_utils.get_last_checkpoint` also returns those a killed process left half-written.
    """
    numbered = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rpartition("-")[2]
        if step.isdecimal():
            numbered[int(step)] = path
    for number in sorted(numbered, reverse=True):
        try:
            state = TrainerState.load_from_json(str(numbered[number] / TRAINER_STATE_NAME))
        except (OSError, TypeError, ValueError):
            continue
        if state.global_step == number:
            return str(numbered[number])
    return None


def checkpoint_to_resume(folder: Path, task: str, resume: str | bool | None, *, is_first: bool) -> str | None:
    """
    The checkpoint that a task goes on from, or `None` to start it.

    Args:
        folder (`Path`): Where the checkpoints of the task are.
        task (`str`): Its name, for messages.
        resume (`str` or `bool`, *optional*): What `train(resume_from_checkpoint=…)` was given.
        is_first (`bool`): Whether no task of the sequence is finished.

    Raises:
        ValueError: if `resume` names a checkpoint of something else, if there is nothing to resume, or if there are
            checkpoints and nobody asked to resume.
    """
    if isinstance(resume, (str, Path)):
        if Path(resume).resolve().parent != folder.resolve():
            raise ValueError(
                f"{resume} is not a checkpoint of the task {task!r}, which comes next: expected one in {folder}. Pass "
                "`resume_from_checkpoint=True` for its newest."
            )
        return str(resume)
    checkpoint = last_complete_checkpoint(folder)
    if resume and checkpoint is None and is_first and not folder.is_dir():
        raise ValueError(
            f"Nothing to resume: no finished task in {folder.parents[1]} and no checkpoint in {folder}. Call train() "
            "without `resume_from_checkpoint`."
        )
    if checkpoint is not None and not resume:
        raise ValueError(
            f"{folder} holds checkpoints of an earlier run. Pass `train(resume_from_checkpoint=True)` to continue it, "
            "or delete the folder to start the task again."
        )
    return checkpoint


def write_method(checkpoint: str | Path, method: str) -> None:
    """Writes the method's name into a checkpoint, for [`check_checkpoint`]."""
    write(Path(checkpoint) / METHOD_FILE, json_bytes(method))


def write_trained(checkpoint: str | Path, step: int) -> None:
    """Writes into a checkpoint that the training of its task ended with that step."""
    write(Path(checkpoint) / TRAINED_FILE, json_bytes({"step": step}))


def is_trained(checkpoint: str | Path) -> bool:
    """Whether the training of the task had ended: resuming from the checkpoint takes no further step."""
    return (Path(checkpoint) / TRAINED_FILE).is_file()


def check_checkpoint(checkpoint: str, method: str, *, with_optimizer: bool, sharded: bool) -> None:
    """
    Raises if training cannot go on from a checkpoint.

    Args:
        checkpoint (`str`): Its folder.
        method (`str`): The method of this run.
        with_optimizer (`bool`): Whether it has to hold the states of optimizer and scheduler.
        sharded (`bool`): Whether it is of a model sharded by FSDP2, which has names of its own for the optimizer.

    Raises:
        FileNotFoundError: if a file is missing; the message names it.
        ValueError: if it is of another method.
    """
    folder = Path(checkpoint)
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if with_optimizer else ():
        if not any(folder.glob("optimizer*" if sharded and name == OPTIMIZER_NAME else name)):
            raise FileNotFoundError(
                f"{name} is missing in {checkpoint}: the training would go on with a fresh optimizer. Delete the "
                "folder and resume from an earlier checkpoint."
            )
    path = folder / METHOD_FILE
    trained_with = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else method
    if trained_with != method:
        raise ValueError(
            f"{checkpoint} was trained with the method {trained_with!r}, not with {method!r}. Resume with that "
            "method, or delete the folder to start the task again."
        )
