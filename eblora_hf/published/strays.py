"""What may lie in the folder of a sequence beside it: tasks that the index does not know, and links to elsewhere."""

import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from .index import ADAPTER, INDEX, TaskRecord

_ASIDE = "set-aside"
_TREES = ("tasks", "checkpoints")


def check_strays(folder: Path, tasks: list[TaskRecord], name: str) -> None:
    """
    Raises if a folder holds tasks that its index does not know, other than what a killed `append` of `name` leaves.

    Raises:
        ValueError: naming them: appending could destroy them.
    """
    known = {Path(task.folder).name for task in tasks}
    found = list(_task_folders(folder, known))
    if not tasks and not found and (folder / ADAPTER).exists():
        raise ValueError(
            f"{folder} holds an adapter that is not of a sequence and would be replaced. Use another folder."
        )
    strays = [path.name for path in found if path.name != f"{len(tasks):02d}-{name}"]
    if strays:
        raise ValueError(
            f"{folder / 'tasks'} holds {', '.join(sorted(strays))}, which the index ({INDEX}) does not list: a run "
            f"was killed, or the index is older than the folder. `eblora repair {folder}` moves what is not listed to "
            f"{folder / _ASIDE} and changes nothing else; or use another folder."
        )


def set_strays_aside(folder: Path, tasks: Collection[TaskRecord]) -> list[Path]:
    """Moves what a folder holds beside the listed tasks out of the way, and returns where to. Nothing is deleted."""
    moved = []
    for path in _task_folders(folder, {Path(task.folder).name for task in tasks}):
        target = folder / _ASIDE / path.name
        number = 1
        while target.exists():
            number += 1
            target = target.with_name(f"{path.name}.{number}")
        target.parent.mkdir(exist_ok=True)
        shutil.move(path, target)
        moved.append(target)
    return moved


def check_links(folder: Path) -> None:
    """
    Raises if something in the folder of a sequence that is written to is a symbolic link: in `tasks` and `checkpoints`
    any, in the root one to outside of the folder.

    A folder that was cloned may hold any: what follows one would overwrite a file of the user's.

    Raises:
        ValueError: naming the link.
    """
    root = folder.resolve()
    for path in _written(folder):
        beside = path.parent == folder and path.name not in _TREES and path.resolve().is_relative_to(root)
        if path.is_symlink() and not beside:
            raise ValueError(
                f"{path} is a symbolic link to {os.readlink(path)}: it is not written through. Remove it, or use "
                "another folder."
            )


def _task_folders(folder: Path, known: Collection[str]) -> Iterator[Path]:
    """What lies in `tasks` beside the known folders, but for temporary names."""
    for path in sorted(folder.glob("tasks/[!.]*")):
        if path.name not in known:
            yield path


def _written(folder: Path) -> Iterator[Path]:
    """What a run may write to: the root, and all of `tasks` and `checkpoints`."""
    for path in folder.iterdir() if folder.is_dir() else ():
        yield path
        if path.name in _TREES and not path.is_symlink():
            for parent, folders, files in os.walk(path):
                yield from (Path(parent, name) for name in (*folders, *files))
