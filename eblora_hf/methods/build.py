"""The method that a configuration asks for."""

from ..config import EBLoRAConfig
from .base import Method
from .eblora import EBLoRA
from .ebo import EBO
from .ella import ELLA
from .inflora import InfLoRA
from .keeplora import KeepLoRA
from .lora import SequentialLoRA
from .olora import OLoRA
from .osf import OSF


def build_method(config: EBLoRAConfig) -> Method:
    """The strategy that `config.method` names; the configuration has checked the name."""
    methods = {
        "eblora": EBLoRA,
        "ebo": EBO,
        "ella": ELLA,
        "inflora": InfLoRA,
        "keeplora": KeepLoRA,
        "lora": SequentialLoRA,
        "olora": OLoRA,
        "osf": OSF,
    }
    return methods[config.method](config)
