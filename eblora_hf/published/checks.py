"""What is checked of tensors before they are published, and of files after."""

from pathlib import Path

import torch

from ..adapters.states import AdapterState, factors_of
from ..manifold.penalty import Curvature
from .files import check_no_pointer, sha256

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of entries of FᵀF - I; bases of half precision are rounded
_TOLERANCE_OF_HALVES = 5e-2


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


def check_finite(task: str, tensors: dict[str, torch.Tensor], bad_step: int | None = None) -> None:
    """
    Raises if something that would be published of a task is not finite.

    Args:
        task (`str`): Its name.
        tensors (`dict[str, torch.Tensor]`): By name.
        bad_step (`int`, *optional*): The first step whose loss was not finite, where that is known.

    Raises:
        ValueError: naming the task and the tensor.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            since = "" if bad_step is None else f", and the first loss that was not is that of step {bad_step}"
            raise ValueError(
                f"The task {task!r} has diverged: {name} is not finite (inf or NaN){since}. Nothing of it is "
                "published. Lower the learning rate, clip gradients (`max_grad_norm`), train in float32 or bf16 "
                "instead of fp16, or look for the sample that makes the loss so; then delete the task's checkpoints "
                "and start it again."
            )


def check_columns(
    columns: dict[str, torch.Tensor], adapter: AdapterState, before: dict[str, torch.Tensor], source: str | Path
) -> None:
    """
    Raises if columns are not what a task adds to the bases of its layers.

    Args:
        columns (`dict[str, torch.Tensor]`): `(d_in, k)` by layer name, as stored.
        adapter (`dict[str, torch.Tensor]`): The task's adapter: each of its layers has columns, if only none of them.
        before (`dict[str, torch.Tensor]`): The bases `(d_in, p)` before the task.
        source (`str` or `Path`): For the message.

    Raises:
        ValueError: naming the layer, if its columns are missing, of another shape, or not orthonormal.
    """
    lora_a = factors_of(adapter, "lora_A")
    different = sorted(lora_a.keys() ^ columns.keys())
    if different:
        raise ValueError(
            f"{source} has to have columns for each layer that the task adapted, and for no other: it differs in "
            f"{', '.join(different)}"[:500]
        )
    for name, new in columns.items():
        d_in = lora_a[name].shape[1]
        basis = before.get(name, new.new_zeros(d_in, 0))
        if new.ndim != 2 or new.shape[0] != d_in or new.shape[1] + basis.shape[1] > d_in:
            raise ValueError(
                f"{source}: the columns of {name} have shape {tuple(new.shape)}, expected ({d_in}, k) with k at most "
                f"{d_in - basis.shape[1]}."
            )
        products = torch.cat([basis.float(), new.float()], dim=1).mT @ new.float()  # (p + k, k)
        products[basis.shape[1] :].diagonal().sub_(1.0)
        if products.numel() and products.abs().max() > _TOLERANCE.get(new.dtype, _TOLERANCE_OF_HALVES):
            raise ValueError(
                f"{source}: the columns of {name} are not orthonormal, to each other and to those of earlier tasks "
                f"(they deviate by {products.abs().max():.2g})."
            )


def check_curvatures(curvatures: dict[str, Curvature], adapter: AdapterState, source: str | Path) -> None:
    """
    Raises if roots of curvatures do not fit the layers of a task.

    Raises:
        ValueError: naming the layer, if a root is of another shape.
    """
    lora_a, lora_b = factors_of(adapter, "lora_A"), factors_of(adapter, "lora_B")
    for name, curvature in curvatures.items():
        sides = (lora_a[name].shape[1], lora_b[name].shape[0]) if name in lora_a else (0, 0)
        for root, side in zip((curvature.inputs, curvature.outputs), sides, strict=True):
            if root.ndim != 2 or root.shape[0] != side or root.shape[1] > side:
                raise ValueError(
                    f"{source}: a root of the curvature of {name} has shape {tuple(root.shape)}, expected ({side}, k) "
                    f"with k at most {side}."
                )


def verify(path: Path, digest: str, whose: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} {whose} is missing; restore it from a copy of the sequence.")
    check_no_pointer(path)
    if sha256(path) != digest:
        raise ValueError(
            f"{path} {whose} was changed after it was published (its sha256 differs from the index). Restore it from "
            "a copy of the sequence; if a training run was killed here, run it again."
        )


def matches(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest
