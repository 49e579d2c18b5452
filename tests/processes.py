"""Commands in processes of their own, and what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil


def start_python(
    arguments: list[str], errors: Path | None = None, **environment: str
) -> subprocess.Popen[bytes]:
    """Python in a session of its own, which all processes that it starts belong to. Its standard
    error goes to a file.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RAYTVB_RAY_"))}
    with open(errors or os.devnull, "wb") as file:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env={**inherited, **environment},
            stdout=subprocess.DEVNULL if errors is None else file,
            stderr=file,
            start_new_session=True,
        )


def session(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The running processes in the session of a process."""
    found = []
    for other in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            is_running = other.status() != psutil.STATUS_ZOMBIE
            if is_running and os.getsid(other.pid) == process.pid:
                found.append(other)
    return found


def titles(process: subprocess.Popen[bytes]) -> list[str]:
    """What the processes of a session call themselves, such as `ray::finetune_task`."""
    return titles_of(session(process))


def titles_of(processes: Iterable[psutil.Process]) -> list[str]:
    """The same for some processes; one that has ended has no title."""
    found = []
    for other in processes:
        with suppress(psutil.Error):
            found.append((other.cmdline() or [other.name()])[0].rpartition("/")[2].strip())
    return found


def wait_until(holds: Callable[[], bool], what: str, patience_s: float = 240) -> None:
    """Wait until a condition holds. Raises AssertionError with `what` if it never does."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def wait_while_running(
    process: subprocess.Popen[bytes], holds: Callable[[], bool], what: str
) -> None:
    """Like `wait_until`, and fails at once if the process ends before."""

    def holds_in_time() -> bool:
        assert process.poll() is None, f"the process ended before: {what}"
        return holds()

    wait_until(holds_in_time, what)


def nothing_is_left_of(process: subprocess.Popen[bytes], patience_s: float = 10) -> bool:
    """Whether all processes of a session end within a time. Kills those that do not."""
    deadline = time.monotonic() + patience_s
    while session(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = session(process)
    for other in left:
        with suppress(psutil.Error):
            print("left:", other)
            other.send_signal(signal.SIGKILL)
    return not left
