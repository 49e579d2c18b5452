"""Seeds of single tasks."""

from __future__ import annotations

import zlib


def task_seed(seed: int, name: str) -> int:
    """The seed of a task. It depends on the experiment's seed and the task's name, and on no other
    task.
    """
    return zlib.crc32(f"{seed}/{name}".encode())
