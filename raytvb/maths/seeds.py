"""Seeds of single tasks."""

from __future__ import annotations

import zlib


def task_seed(seed: int, name: str) -> int:
    """The seed of a task, from the experiment's seed and the task's name: other tasks do not
    matter.
    """
    return zlib.crc32(f"{seed}/{name}".encode())
