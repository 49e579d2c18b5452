"""Ends the processes of a Ray that this process started, in whatever way this process ends.

Ray's own servers end with the process that started them: Linux kills them. But Ray's two agents
notice that only after a minute, if the process was killed. So `connect` starts a guard: this module
as a small process of its own, which imports neither Ray nor torch. It notes Ray's processes
while they run, and kills those that are left when its standard input ends, which is when the
process that started it is gone.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from contextlib import suppress

import psutil

SERVERS = ("raylet", "gcs_server")
"""Names of the processes that `ray.init` starts."""

NOTE_S = 1.0
"""How often the guard notes Ray's processes."""


def ray_processes(parent: psutil.Process) -> set[psutil.Process]:
    """Ray's servers among the children of a process, and all processes below those."""
    found = set[psutil.Process]()
    with suppress(psutil.Error):
        for child in parent.children():
            with suppress(psutil.Error):
                if child.name() in SERVERS:
                    found.update([child, *child.children(recursive=True)])
    return found


def kill(processes: set[psutil.Process]) -> None:
    """SIGKILL processes. One that has ended is left alone, also if another has its number now."""
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def end_own_ray() -> None:
    """Kill the Ray that this process started, at once."""
    kill(ray_processes(psutil.Process()))


def start_guard() -> subprocess.Popen[bytes]:
    """Start a guard of this process. It ends by itself, after this process."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in a terminal does not reach it
    )


def _guard(pid: int) -> None:
    """Note the processes of Ray until standard input ends, then kill those that are left."""
    known = set[psutil.Process]()
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        while not select.select([sys.stdin], [], [], NOTE_S)[0]:
            known |= ray_processes(parent)
            known = {process for process in known if process.is_running()}
    kill(known)


if __name__ == "__main__":
    _guard(int(sys.argv[1]))
