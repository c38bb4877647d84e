"""What the owner of a sequence keeps beside it and never pushes."""

from pathlib import Path
from typing import Any

from .files import json_bytes, write
from .schema import MAX_JSON, OwnerSettings, check_settings, read_checked

SETTINGS = ".eblora_local.json"


def settings_of(folder: Path) -> OwnerSettings:
    """Where the bases went by repository, the local path of the base model, and which files lie beside the adapter."""
    path = folder / SETTINGS
    return read_checked(path, "record of what is local", MAX_JSON, check_settings) if path.is_file() else {}


def remember(folder: Path, **changes: Any) -> None:
    """Keeps settings of the sequence in a folder, for [`settings_of`]."""
    known = settings_of(folder)
    changed = known | changes
    if changed != known:
        write(folder / SETTINGS, json_bytes(changed))


def remember_bases(folder: Path, repo_id: str, bases: str) -> None:
    """Keeps where the bases went when the sequence was pushed to a repository."""
    remember(folder, bases=settings_of(folder).get("bases", {}) | {repo_id: bases})
