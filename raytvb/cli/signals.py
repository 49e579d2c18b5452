"""What Ctrl-C and SIGTERM do: the command stops in an orderly way, and the exit code is 130.

The first signal raises KeyboardInterrupt. The stages then start nothing new, fine-tunes that run
save a checkpoint, and Ray is shut down. A second signal, or STOP_S seconds, end the process at
once: it kills the Ray that it started, and exits. SIGTERM is what cluster managers send; SLURM and
Kubernetes kill what is left 30 seconds later.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from types import FrameType

INTERRUPTED = 130
"""Exit code after Ctrl-C, the same as in a shell."""

STOPPED = "stopped; run the same command again to go on"

STOP_S = 28.0
"""How long an orderly stop may take."""

SAME_S = 0.3
"""Signals that come within this time of the first one count as the same: programs that run this
one often pass a signal on that it has already got from the terminal."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handle_signals() -> None:
    """Install the handlers for the rest of this process. A SIGINT that is ignored stays ignored,
    as in the background of a shell script.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python writes the number of every signal into this pipe, also while the main thread is in C
    # code and cannot run a handler.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    raised = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not raised.is_set():
            raised.set()
            raise KeyboardInterrupt

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()


def _watch(reader: int) -> None:
    """End the process at the second signal, or STOP_S seconds after the first."""
    _next_signal(reader, None)
    first = time.monotonic()
    if sys.stderr.isatty():
        print("stopping; press Ctrl-C again to stop at once", file=sys.stderr)
    while _next_signal(reader, first + STOP_S) and time.monotonic() < first + SAME_S:
        continue
    _end_at_once()


def _next_signal(reader: int, deadline: float | None) -> bool:
    """Wait for one of SIGNALS. Returns whether one came before the deadline, if there is one."""
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reader], [], [], left)[0]:
            return False
        if os.read(reader, 1)[0] in SIGNALS:
            return True


def _end_at_once() -> None:
    """Kill the Ray that this process started, say that the command has stopped, and exit."""
    if "raytvb.orchestration.leftovers" in sys.modules:
        from raytvb.orchestration.leftovers import end_own_ray

        end_own_ray()
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(INTERRUPTED)
