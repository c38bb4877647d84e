"""Requests to the Hub: each has a time-out, and what may pass is tried again."""

from collections.abc import Callable
from typing import Any

import tenacity
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers.utils import logging

logger = logging.get_logger(__name__)

TIMEOUT = 30.0  # seconds in which nothing comes or goes


class HubApi(HfApi):
    """`HfApi` whose `repo_info`, which others of its methods call too, does not wait for ever."""

    def repo_info(self, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        return super().repo_info(*args, timeout=timeout or TIMEOUT, **kwargs)


def is_unanswered(error: BaseException | None) -> bool:
    """Whether the Hub has not answered: a time-out, no connection, or offline mode."""
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):  # the first is what a HEAD request becomes
        return True
    return _is_a(error, "TransportError")


def _is_a(error: BaseException | None, name: str) -> bool:
    """
    Whether an error, or what caused it, is of a class of that name: huggingface_hub 1 and 2 build on different HTTP
    clients.
    """
    while error is not None:
        if any(cls.__name__ == name for cls in type(error).__mro__):
            return True
        error = error.__cause__
    return False


def retried(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """
    What a function of `HfApi` returns. Rate limits, server errors and time-outs are tried again, with back-off.
    """
    return _retry(_with_timeout, function, *args, **kwargs)


def _with_timeout(function: Callable, *args: Any, **kwargs: Any) -> Any:
    session = get_session()  # one for all of huggingface_hub, which would wait for ever
    if session.timeout.read is None:
        session.timeout = TIMEOUT  # type: ignore[assignment]
    return function(*args, **kwargs)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if is_unanswered(error):
        return True
    if isinstance(error, RepositoryNotFoundError | EntryNotFoundError):
        return False
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code == 429 or error.response.status_code >= 500
    return False


def _is_enough(state: tenacity.RetryCallState) -> bool:
    """Six tries in all, two of a Hub that lets us wait."""
    error = state.outcome.exception() if state.outcome is not None else None
    waited = isinstance(error, LocalEntryNotFoundError) or _is_a(error, "TimeoutException")
    return state.attempt_number >= (2 if waited else 6)


def _say_that_it_is_tried_again(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome is not None else None
    logger.warning(f"The Hub failed ({error}); trying again.")


_retry = tenacity.Retrying(
    retry=tenacity.retry_if_exception(_is_transient),
    wait=tenacity.wait_random_exponential(multiplier=1, max=30),
    stop=_is_enough,
    before_sleep=_say_that_it_is_tried_again,
    reraise=True,
)
