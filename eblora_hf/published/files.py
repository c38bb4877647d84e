"""Files that are there whole or not at all, their bytes and their hashes."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

_POINTER = b"version https://git-lfs.github.com/spec/"


def tensor_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """A safetensors file, the same bytes for the same tensors."""
    return safetensors.torch.save({key: tensors[key].contiguous() for key in sorted(tensors)}, {"format": "pt"})


def json_bytes(value: Any) -> bytes:
    """A JSON file, the same bytes for the same value."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def check_no_pointer(path: Path) -> None:
    """
    Raises if a file is only the pointer that Git leaves where Git LFS was not set up.

    Raises:
        ValueError: naming it.
    """
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS, not the file itself. Fetch it with `git lfs pull`.")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write(path: Path, data: bytes) -> None:
    """Replaces a file in one step: its old or its new content is there whenever the process dies."""
    with _replacing(path) as temporary, temporary.open("xb") as file:  # nobody else's, and no link to somewhere else
        file.write(data)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replaces a safetensors file in one step, without its bytes in memory beside the tensors."""
    with _replacing(path) as temporary:
        safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Gives the name of a file to be made, which takes the place of the one at `path` at the end of the context."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """A name beside a file or folder that no other process takes."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    if os.name == "posix":  # elsewhere folders cannot be opened, and renames are ordered by the file system
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
