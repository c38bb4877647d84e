"""Continual-learning methods as strategies over one trainer."""

from ..config import EBLoRAConfig
from .base import Method
from .eblora import EBLoRA
from .ebo import EBO
from .inflora import InfLoRA
from .keeplora import KeepLoRA
from .lora import SequentialLoRA
from .olora import OLoRA
from .osf import OSF

__all__ = ["EBO", "OSF", "EBLoRA", "InfLoRA", "KeepLoRA", "Method", "OLoRA", "SequentialLoRA", "build_method"]


def build_method(config: EBLoRAConfig) -> Method:
    """The strategy that `config.method` names; the configuration has checked the name."""
    methods = {
        "eblora": EBLoRA,
        "ebo": EBO,
        "inflora": InfLoRA,
        "keeplora": KeepLoRA,
        "lora": SequentialLoRA,
        "olora": OLoRA,
        "osf": OSF,
    }
    return methods[config.method](config)
