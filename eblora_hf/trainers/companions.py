"""What lies beside the adapter for stock loaders: tokenizer or processor, and where the base model is."""

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ..published.files import write
from ..published.identity import local_path
from ..published.owner import remember
from ..published.sequence import PublishedSequence


def name_base_model(folder: Path, base_model: nn.Module) -> None:
    """Keeps the folder that the base model came from, if it was one, for the root's `adapter_config.json`."""
    path = local_path(base_model)
    if path is not None:
        folder.mkdir(parents=True, exist_ok=True)
        remember(folder, base_model=path)


def write_processing_class(sequence: PublishedSequence, processing_class: Any) -> None:
    """
    Writes the files of a tokenizer or processor beside the adapter.

    Args:
        sequence ([`PublishedSequence`]): The sequence.
        processing_class (*optional*): What the trainer was given; `None` for none.
    """
    if not hasattr(processing_class, "save_pretrained"):
        return
    with tempfile.TemporaryDirectory() as scratch:
        processing_class.save_pretrained(scratch)
        files = {path.relative_to(scratch).as_posix(): path for path in Path(scratch).rglob("*") if path.is_file()}
        for name, path in files.items():
            write(sequence.folder / name, path.read_bytes())
    remember(sequence.folder, companions=sorted(files))
