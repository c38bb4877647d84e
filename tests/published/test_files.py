"""Files that are there whole or not at all."""

import pytest
import torch
from safetensors.torch import load_file

from eblora_hf.published.files import write, write_tensors


def test_tensors_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "x.safetensors"
    tensors = {"turned": torch.arange(6.0).reshape(2, 3).T, "count": torch.tensor(3)}
    write_tensors(path, tensors)
    assert all(torch.equal(value, tensors[key]) for key, value in load_file(path).items())
    before = path.read_bytes()
    with pytest.raises(AttributeError, match="contiguous"):
        write_tensors(path, {"count": "no tensor"})
    assert path.read_bytes() == before
    write_tensors(path, {"other": torch.ones(1)})
    assert list(load_file(path)) == ["other"]
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


def test_a_file_that_cannot_be_put_in_place_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write(tmp_path / "taken", b"content")
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]
