"""What is checked of tensors before they are published, and of files after."""

from pathlib import Path

import torch

from ..adapters.states import AdapterState
from ..memory.basis import BasisExtension
from .files import sha256


def check_new_names(names: list[str], there: list[str], folder: Path) -> None:
    """
    Raises if a new task would have the name of one that is there, be it in other case.

    Raises:
        ValueError: naming both.
    """
    known = {name.lower(): name for name in there}
    for name in names:
        if name.lower() in known:
            raise ValueError(
                f"The sequence in {folder} already has a task {known[name.lower()]!r}; choose another name than "
                f"{name!r} (some file systems do not tell case)."
            )


def check_finite(task: str, adapter: AdapterState, extensions: dict[str, BasisExtension]) -> None:
    """
    Raises if something that would be published of a task is not finite.

    Raises:
        ValueError: naming the task and the tensor.
    """
    columns = {f"the basis of {name}": extension.columns for name, extension in extensions.items()}
    for name, tensor in (adapter | columns).items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"The task {task!r} has diverged: {name} is not finite (inf or NaN), and nothing of it is published. "
                "Lower the learning rate, clip gradients (`max_grad_norm`), train in float32 or bf16 instead of fp16, "
                "or look for the sample that makes the loss so, and start the task again."
            )


def verify(path: Path, digest: str, whose: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} {whose} is missing; restore it from a copy of the sequence.")
    if sha256(path) != digest:
        raise ValueError(
            f"{path} {whose} was changed after it was published (its sha256 differs from the index). Restore it from "
            "a copy of the sequence; if a training run was killed here, run it again."
        )


def matches(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest
