"""Processes that the chaos benchmark has started, with all that these have started in turn."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from contextlib import suppress

from raytvb.errors import UserError

try:
    import psutil
except ImportError as error:
    raise UserError("bench chaos needs psutil: pip install 'raytvb[test]'") from error

END_S = 20.0
"""How long killed processes may take to vanish."""


class Family:
    """A process that we started, and all its descendants, also those whose parents have died."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """process: one that has not been waited for."""
        self.process = process
        self._first = psutil.Process(process.pid)
        self._members: set[psutil.Process] = {self._first}

    def refresh(self) -> None:
        """Look for new descendants of the members. Call it about once a second."""
        with suppress(psutil.NoSuchProcess):
            self._members.update(self._first.children(recursive=True))
        self._members = {member for member in self._members if is_alive(member)}

    def titled(self, *prefixes: str) -> list[psutil.Process]:
        """The members whose command line begins with one of the prefixes, by rising process id.

        Ray shows in this place what a worker does.
        """
        self.refresh()
        found = []
        for member in sorted(self._members, key=lambda process: process.pid):
            with suppress(psutil.Error):
                if (member.cmdline() or [""])[0].startswith(prefixes):
                    found.append(member)
        return found

    def kill(self) -> None:
        """SIGKILL the process and its descendants, and wait until they are gone."""
        self.refresh()
        # The first one goes first, so that it cannot start others.
        _kill([self._first])
        _kill(self._members)
        self.process.wait()
        _, remaining = psutil.wait_procs(self._members, timeout=END_S)
        if remaining:
            raise RuntimeError(f"processes do not end after SIGKILL: {remaining}")


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs. A zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def kill(process: psutil.Process) -> bool:
    """SIGKILL one process. Returns whether it was there. Its id may not mean another one by now."""
    with suppress(psutil.NoSuchProcess):
        process.kill()  # raises if the id belongs to a younger process
        return True
    return False


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        kill(process)
