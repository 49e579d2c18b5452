"""One policy for all requests to a storage: what may pass is tried again until the patience ends.

`transient` says which failures may pass. Pauses between tries grow from a fraction of a second to
15 seconds and are drawn at random, so that a thousand workers do not return at the same moment.
Requests to S3 are repeated one by one; an operation of a `Store` is repeated as a whole where that
is not enough. Nothing below repeats requests as well: the numbers of tries would multiply.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

from raytvb.storage.store_errors import GaveUpError
from raytvb.storage.transient import is_transient

Result = TypeVar("Result")

DEFAULT_PATIENCE_S = 30.0
"""Patience of a process that runs no experiment, such as one that lists a store."""

_SHORTEST_S, _LONGEST_S = 0.25, 15.0

# For a first look at a storage, whose address may be wrong: nobody waits long for that. With
# requests that end after QUICK_REQUEST_S, two that get no answer take 18 seconds.
QUICK_REQUEST_S = 9.0
_QUICK_ATTEMPTS, _QUICK_S = 4, QUICK_REQUEST_S + 0.5

_patience = DEFAULT_PATIENCE_S


def set_patience(seconds: float) -> None:
    """Set for how long this process repeats a failing request. Called where work enters a process.

    seconds: `resources.storage_timeout_s` of the experiment, counted from a request's first
    failure. 0: nothing is repeated.
    """
    global _patience
    _patience = seconds


def patience() -> float:
    """For how many seconds this process repeats a failing request."""
    return _patience


def repeated(call: Callable[[], Result]) -> Result:
    """The result of a call, which is repeated while it fails in a way that may pass.

    Raises any other error as it is, and GaveUpError, with the last failure as its cause, when the
    patience ends.
    """
    limit, decision = _Limit(patience()), _Decision()
    retrying = Retrying(
        retry=decision,
        wait=limit.pause,
        stop=limit.is_over,
        retry_error_callback=limit.give_up,
    )
    try:
        return retrying(call)
    finally:
        decision.forget()


async def repeated_request(call: Callable[[], Awaitable[Result]]) -> Result:
    """As `repeated`, for a function that is declared with `async def`."""
    limit, decision = _Limit(patience()), _Decision()
    retrying = AsyncRetrying(
        retry=decision,
        wait=limit.pause,
        stop=limit.is_over,
        retry_error_callback=limit.give_up,
    )
    try:
        return await retrying(call)
    finally:
        decision.forget()


async def quickly(call: Callable[[], Awaitable[Result]]) -> Result:
    """As `repeated_request`, but gives up soon, whatever the patience. Raises the last failure."""
    decision = _Decision()
    retrying = AsyncRetrying(
        retry=decision,
        wait=wait_random_exponential(multiplier=_SHORTEST_S, max=1.0),
        stop=stop_after_attempt(_QUICK_ATTEMPTS) | stop_after_delay(_QUICK_S),
        reraise=True,
    )
    try:
        return await retrying(call)
    finally:
        decision.forget()


class _Decision:
    """Whether a call that has failed is repeated.

    The library's state of a call and the traceback of its failure hold each other. A traceback
    holds the variables of all callers, which may be large. `forget` lets them go at once, where a
    missing file, for example, is an ordinary answer.
    """

    def __init__(self) -> None:
        self._state: RetryCallState | None = None

    def __call__(self, state: RetryCallState) -> bool:
        self._state = state
        error = None if state.outcome is None else state.outcome.exception()
        return error is not None and is_transient(error)

    def forget(self) -> None:
        """Let the last failure go."""
        if self._state is not None:
            self._state.outcome = None


class _Limit:
    """The end of the patience with one call. It counts from the call's first failure.

    A long upload that succeeds in the end must not be given up because it began long ago.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._first_failure: float | None = None
        self._growing = wait_random_exponential(multiplier=_SHORTEST_S, max=_LONGEST_S)

    def _left(self) -> float:
        now = time.monotonic()
        if self._first_failure is None:
            self._first_failure = now
        return self._first_failure + self._seconds - now

    def pause(self, state: RetryCallState) -> float:
        """Seconds until the next try. The last try is at the end of the patience."""
        return max(0.0, min(self._growing(state), self._left()))

    def is_over(self, state: RetryCallState) -> bool:
        """Whether the call that has just failed was the last one."""
        return self._left() <= 0

    def give_up(self, state: RetryCallState) -> NoReturn:
        """Raise GaveUpError."""
        cause = state.outcome.exception() if state.outcome is not None else None
        raise GaveUpError(state.attempt_number, state.seconds_since_start or 0.0) from cause
