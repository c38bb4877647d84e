"""Continual-learning methods as strategies over one trainer."""

from ..config import EBLoRAConfig
from .base import Method
from .eblora import EBLoRA
from .ebo import EBO
from .lora import SequentialLoRA

__all__ = ["EBO", "EBLoRA", "Method", "SequentialLoRA", "build_method"]


def build_method(config: EBLoRAConfig) -> Method:
    """The strategy that `config.method` names; the configuration has checked the name."""
    return {"eblora": EBLoRA, "ebo": EBO, "lora": SequentialLoRA}[config.method](config)
