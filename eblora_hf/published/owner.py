"""What the owner of a sequence keeps beside it and never pushes."""

import threading
from pathlib import Path
from typing import Any

from .files import json_bytes, write
from .schema import MAX_JSON, OwnerSettings, check_settings, read_checked

SETTINGS = ".eblora_local.json"
_ONE_AT_A_TIME = threading.Lock()  # a push runs in the background


def settings_of(folder: Path) -> OwnerSettings:
    """Where the bases went by repository, the local path of the base model, and which files lie beside the adapter."""
    path = folder / SETTINGS
    return read_checked(path, "record of what is local", MAX_JSON, check_settings) if path.is_file() else {}


def remember(folder: Path, **changes: Any) -> None:
    """
    Keeps settings of the sequence in a folder, for [`settings_of`].

    Raises:
        ValueError: if they could not be read again; nothing is written then.
    """
    with _ONE_AT_A_TIME:
        known = settings_of(folder)
        _keep(folder, known, known | changes)


def remember_bases(folder: Path, repo_id: str, bases: str) -> None:
    """Keeps where the bases went when the sequence was pushed to a repository."""
    with _ONE_AT_A_TIME:
        known = settings_of(folder)
        _keep(folder, known, known | {"bases": known.get("bases", {}) | {repo_id: bases}})


def companions_of(folder: Path) -> list[Path]:
    """The files beside the adapter that are pushed with it; none that a link leads to elsewhere."""
    paths = [folder / name for name in settings_of(folder).get("companions", [])]
    return [path for path in paths if path.is_file() and path.resolve().is_relative_to(folder.resolve())]


def _keep(folder: Path, known: Any, changed: Any) -> None:
    if changed != known:
        data = json_bytes(changed)
        check_settings(data)
        write(folder / SETTINGS, data)
