"""SIGTERM between the trainings of a sequence, where `enable_jit_checkpoint` asks for a stop instead of a death."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from transformers.trainer_callback import CallbackHandler


class StopRequestedError(BaseException):
    """SIGTERM has arrived outside of a training loop. Nothing is lost: what was trained is kept already."""


@contextlib.contextmanager
def stops_on_sigterm(handler: CallbackHandler) -> Iterator[None]:
    """
    Within the context SIGTERM raises a [`StopRequestedError`] wherever the `Trainer` does not handle it itself: in
    snapshots, evaluations and pushes. Does nothing for a `Trainer` that was not asked to handle it.

    Args:
        handler (`CallbackHandler`): The callbacks of the trainer.
    """
    managers = _managers(handler)
    if not managers:
        yield
        return
    original = managers[0]._original_sigterm_handler  # what the parent leaves behind, too

    def stop(number: int, frame: Any) -> None:
        raise StopRequestedError

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, original)


def listen_again(handler: CallbackHandler) -> None:
    """Has the `Trainer` handle SIGTERM in its next training as well; it stops to after each."""
    for manager in _managers(handler):
        manager.setup_signal_handler()


def _managers(handler: CallbackHandler) -> list[Any]:
    managers = [getattr(callback, "jit_manager", None) for callback in handler.callbacks]
    return [manager for manager in managers if manager is not None]
