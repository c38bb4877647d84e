"""One writer a folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock


@contextlib.contextmanager
def one_writer(folder: Path, what: str, *, patience: float = 0.0, writes: bool = True) -> Iterator[None]:
    """
    Within the context no other process does the same in a folder.

    Args:
        folder (`Path`): The folder of a sequence; it is created if need be.
        what (`str`): `"run"` for a run that learns tasks, `"append"` for the moment in which one is appended.
        patience (`float`, defaults to 0.0): Seconds to wait for another process.
        writes (`bool`, defaults to `True`): Whether this process writes at all; one that does not needs no lock.

    Raises:
        ValueError: if another process goes on doing it.
    """
    if not writes:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / f".{what}.lock")
    try:
        lock.acquire(timeout=patience)
    except filelock.Timeout as error:
        raise ValueError(
            f"Another process is writing into {folder}. Wait for its end, or use another `output_dir`: a sequence has "
            "one writer at a time."
        ) from error
    try:
        yield
    finally:
        lock.release()
