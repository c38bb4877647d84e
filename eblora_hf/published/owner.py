"""What the owner of a sequence keeps beside it and never pushes: where its bases were to go."""

from pathlib import Path

from .files import json_bytes, write
from .schema import MAX_JSON, check_settings, read_checked

SETTINGS = ".eblora_hub.json"


def bases_of(folder: Path, repo_id: str) -> str | None:
    """Where the bases of the sequence in a folder went when it was pushed to a repository, if it was."""
    path = folder / SETTINGS
    return read_checked(path, "record of pushes", MAX_JSON, check_settings).get(repo_id) if path.is_file() else None


def remember_bases(folder: Path, repo_id: str, bases: str) -> None:
    """Keeps where the bases of the sequence in a folder go, for [`bases_of`]."""
    path = folder / SETTINGS
    known = read_checked(path, "record of pushes", MAX_JSON, check_settings) if path.is_file() else {}
    if known.get(repo_id) != bases:
        write(path, json_bytes(known | {repo_id: bases}))
