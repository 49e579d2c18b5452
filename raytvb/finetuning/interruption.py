"""Lets a fine-tune that is interrupted end between two steps, so that no step is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def noted_interruption() -> Iterator[Callable[[], bool]]:
    """Within this context, SIGINT is noted instead of raised. Yields: whether there was one.

    Ctrl-C sends SIGINT, and Ray acts as if there were one in the worker of a task that is
    cancelled. Only the main thread of a process can handle signals; in another one this context
    changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    noted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.set())
    try:
        yield noted.is_set
    finally:
        # None: a handler that was not installed by Python, and cannot be put back by it.
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
