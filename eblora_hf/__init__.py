"""Continual fine-tuning with `transformers.Trainer`: orthonormal, gradient-orthogonal LoRA that forgets less."""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .adapters.composition import merge_into_base
    from .adapters.smoothing import smooth_adapter
    from .analysis.interference import interference_report
    from .config import EBLoRAConfig
    from .metrics import ContinualMetrics, continual_metrics
    from .published.hub import SequenceConflictError, push_sequence
    from .published.loading import load_sequence
    from .published.sequence import PublishedSequence
    from .tasks import Task, TaskSequence
    from .trainers.callback import TaskSequenceCallback
    from .trainers.continual import ContinualMixin
    from .trainers.preference import ContinualEBLoRADPOTrainer, ContinualEBLoRARewardTrainer
    from .trainers.seq2seq import ContinualEBLoRASeq2SeqTrainer
    from .trainers.sft import ContinualEBLoRASFTTrainer
    from .trainers.trainer import ContinualEBLoRATrainer

# imported at first use: `import eblora_hf` and `eblora --help` load neither torch nor transformers
_MODULE_OF = {
    "ContinualEBLoRADPOTrainer": "trainers.preference",
    "ContinualEBLoRARewardTrainer": "trainers.preference",
    "ContinualEBLoRASFTTrainer": "trainers.sft",
    "ContinualEBLoRASeq2SeqTrainer": "trainers.seq2seq",
    "ContinualEBLoRATrainer": "trainers.trainer",
    "ContinualMetrics": "metrics",
    "ContinualMixin": "trainers.continual",
    "EBLoRAConfig": "config",
    "PublishedSequence": "published.sequence",
    "SequenceConflictError": "published.hub",
    "Task": "tasks",
    "TaskSequence": "tasks",
    "TaskSequenceCallback": "trainers.callback",
    "continual_metrics": "metrics",
    "interference_report": "analysis.interference",
    "load_sequence": "published.loading",
    "merge_into_base": "adapters.composition",
    "push_sequence": "published.hub",
    "smooth_adapter": "adapters.smoothing",
}

__all__ = [
    "ContinualEBLoRADPOTrainer",
    "ContinualEBLoRARewardTrainer",
    "ContinualEBLoRASFTTrainer",
    "ContinualEBLoRASeq2SeqTrainer",
    "ContinualEBLoRATrainer",
    "ContinualMetrics",
    "ContinualMixin",
    "EBLoRAConfig",
    "PublishedSequence",
    "SequenceConflictError",
    "Task",
    "TaskSequence",
    "TaskSequenceCallback",
    "__version__",
    "continual_metrics",
    "interference_report",
    "load_sequence",
    "merge_into_base",
    "push_sequence",
    "smooth_adapter",
]

_OF_TRL = ("ContinualEBLoRADPOTrainer", "ContinualEBLoRARewardTrainer", "ContinualEBLoRASFTTrainer")

if importlib.util.find_spec("trl") is None:  # an extra: `from eblora_hf import *` works without it
    __all__ = [name for name in __all__ if name not in _OF_TRL]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
