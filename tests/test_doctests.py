"""The examples in the docstrings of pure functions."""

import doctest
import importlib
from pathlib import Path

import pytest

import eblora_hf

ROOT = Path(eblora_hf.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in ROOT.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", MODULES)
def test_examples_give_what_they_say(module):
    result = doctest.testmod(importlib.import_module(f"eblora_hf.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_every_wing_of_pure_functions_has_some():
    assert {module.split(".")[0] for module in MODULES} >= {"metrics", "adapters", "manifold", "memory", "methods"}
