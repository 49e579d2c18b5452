"""Seeds of single tasks."""

from __future__ import annotations

import zlib


def task_seed(seed: int, name: str) -> int:
    """A seed of the task's own, from the experiment's seed and the task's name: independent of the
    other tasks.
    """
    return zlib.crc32(f"{seed}/{name}".encode())
