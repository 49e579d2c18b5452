"""Which tasks are added together, and which images are used first: the same for every candidate."""

from __future__ import annotations

import itertools
import math
import zlib

import numpy as np
import torch
from torch import Tensor

SUBSETS_PER_SIZE = 4


def task_subsets(count: int, seed: int) -> dict[int, list[tuple[int, ...]]]:
    """Subsets of the tasks 0..count-1 by their size: 1, T/4, T/2 and T, rounded.

    Size 1 has every task once, size T the one full set. The others have 4 different seeded subsets
    each, or fewer where fewer exist.
    """
    sizes = sorted({1, max(1, round(count / 4)), max(1, round(count / 2)), count})
    subsets: dict[int, list[tuple[int, ...]]] = {}
    for size in sizes:
        existing = math.comb(count, size)
        wanted = count if size == 1 else min(SUBSETS_PER_SIZE, existing)
        if wanted == existing:
            subsets[size] = list(itertools.combinations(range(count), size))
            continue
        rng, chosen = np.random.default_rng([seed, size]), set[tuple[int, ...]]()
        while len(chosen) < wanted:
            chosen.add(tuple(sorted(rng.choice(count, size, replace=False).tolist())))
        subsets[size] = sorted(chosen)
    return subsets


def nested_order(task: str, count: int) -> Tensor:
    """A permutation (count,) of a task's images, the same for every candidate.

    A share of the images is the beginning of the permutation, so a smaller share is part of every
    larger one.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(task.encode()))
    return torch.randperm(count, generator=generator)


def edge(share: float, count: int) -> int:
    """Number of images in a share (0 to 1) of `count` images: at least one, but none for 0."""
    return min(count, max(1, round(share * count))) if share > 0 else 0
