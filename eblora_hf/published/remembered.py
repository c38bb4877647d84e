"""What the task folders of a sequence remember: bases and curvatures."""

from pathlib import Path

import torch

from ..manifold.penalty import Curvature
from ..memory.basis import join_basis
from .adapter_files import read_tensors
from .checks import check_columns, check_curvatures
from .index import ADAPTER, SUBSPACE, TaskRecord
from .task_files import columns_of, curvatures_of


def read_bases(folder: Path, tasks: list[TaskRecord], where: str) -> dict[str, torch.Tensor]:
    """[`PublishedSequence.bases`] of the tasks in a folder, or `where` they are."""
    bases: dict[str, torch.Tensor] = {}
    for task in (task for task in tasks if task.has_basis):
        path = folder / task.folder / SUBSPACE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: the bases of this sequence were not published with it ({where}). Without them a "
                "new task would overwrite what earlier ones learnt. Continue from the folder it was trained in."
            )
        columns = columns_of(read_tensors(path))
        check_columns(columns, read_tensors(folder / task.folder / ADAPTER), bases, path)
        for name, value in columns.items():
            bases[name] = join_basis(bases.get(name), value)
    return bases


def read_curvatures(folder: Path, tasks: list[TaskRecord]) -> dict[str, list[Curvature]]:
    """[`PublishedSequence.curvatures`] of the tasks in a folder."""
    curvatures: dict[str, list[Curvature]] = {}
    for task in (task for task in tasks if task.has_basis):
        path = folder / task.folder / SUBSPACE
        found = curvatures_of(read_tensors(path)) if path.is_file() else {}
        check_curvatures(found, read_tensors(folder / task.folder / ADAPTER), path)
        for name, curvature in found.items():
            curvatures.setdefault(name, []).append(curvature)
    return curvatures
