"""Sequential LoRA: a fresh adapter per task, trained without constraint on top of the earlier ones. The baseline."""

from .base import Method


class SequentialLoRA(Method):
    """
    Plain LoRA (arXiv 2106.09685), task after task: A as it was drawn, B from zero, any optimizer trains.
    """
