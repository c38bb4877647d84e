"""docs/add-a-method.md: the method that it shows is one that trains."""

import re
import types
from pathlib import Path

import torch

from eblora_hf import EBLoRAConfig, PublishedSequence
from eblora_hf.methods.base import Method
from eblora_hf.trainers import continual, one_task

from ..support.trainers import assert_same_files, get_stock_deltas, load_published, make_trainer

PAGE = Path(__file__).parents[2] / "docs" / "add-a-method.md"


def shown_method() -> type[Method]:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    module = types.ModuleType("eblora_hf.methods.gradient_start")
    module.__package__ = "eblora_hf.methods"
    exec(compile(source, str(PAGE), "exec"), vars(module))
    return module.GradientStart


def test_the_method_of_the_page_learns_two_tasks(tmp_path, monkeypatch):
    method = shown_method()
    for module in (continual, one_task):  # in place of a name in build.py
        monkeypatch.setattr(module, "build_method", lambda config: method(config))
    trainer = make_trainer(tmp_path / "one", eblora_config=EBLoRAConfig(energy_threshold=0.9))
    trainer.train()
    assert PublishedSequence.open(tmp_path / "one").names == ["one", "two"]
    for task in ("00-one", "01-two"):
        assert all(delta.abs().max() > 0 for delta in get_stock_deltas("bert", tmp_path / "one/tasks" / task).values())
    assert all(0 < basis.shape[1] < basis.shape[0] for basis in trainer.bases.values())
    make_trainer(tmp_path / "again", eblora_config=EBLoRAConfig(energy_threshold=0.9)).train()
    assert_same_files(load_published(tmp_path / "one"), load_published(tmp_path / "again"))


def test_its_start_lies_outside_the_basis():
    method = shown_method()(EBLoRAConfig())
    layer = types.SimpleNamespace(name="layer", rank=2, weight=torch.zeros(6, 8), lora_A=torch.zeros(2, 8))
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 3, generator=generator)).Q
    method.begin_task([layer], {"layer": torch.randn(6, 8, generator=generator)}, {"layer": basis})
    torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(2))
    assert (layer.lora_A @ basis).abs().max() < 1e-6
