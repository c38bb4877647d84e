"""What `help` and editors show of the trainers: the parent's arguments by name and order, ours by keyword, last."""

import inspect
import subprocess
import sys

import pytest
from transformers import Seq2SeqTrainer, Trainer
from trl import SFTTrainer

from eblora_hf import ContinualEBLoRASeq2SeqTrainer, ContinualEBLoRASFTTrainer, ContinualEBLoRATrainer

OURS = {"peft_config", "eblora_config", "sequence", "task_name", "push_bases", "protect_data", "anchor"}
PAIRS = [
    (ContinualEBLoRATrainer, Trainer),
    (ContinualEBLoRASeq2SeqTrainer, Seq2SeqTrainer),
    (ContinualEBLoRASFTTrainer, SFTTrainer),
]


@pytest.mark.parametrize(("ours", "parent"), PAIRS, ids=lambda cls: cls.__name__)
def test_arguments_are_the_parents_and_then_ours(ours, parent):
    signature, theirs = inspect.signature(ours), inspect.signature(parent)
    names = list(theirs.parameters)
    assert list(signature.parameters)[: len(names)] == names
    for name in names:
        assert signature.parameters[name].default == theirs.parameters[name].default, name
        assert signature.parameters[name].kind == theirs.parameters[name].kind, name
    assert set(signature.parameters) - set(names) == OURS - set(names)
    assert all(signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in OURS - set(names))


def test_the_names_of_the_package_without_trl():
    code = """
import sys

sys.modules["trl"] = None  # as if it were not installed
from eblora_hf import *
print(ContinualEBLoRATrainer.__name__)
try:
    from eblora_hf import ContinualEBLoRASFTTrainer
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = result.stdout.strip().splitlines()
    assert first == "ContinualEBLoRATrainer"
    assert "pip install 'eblora-hf[trl]'" in second
