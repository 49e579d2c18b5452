"""Accuracy of merged models: one image tower, updated in place from the pretrained values for each merge.

A merge is theta_0 + alpha * d with a direction d on the common coordinates of a set of vectors. Every update starts
from the stored pretrained values, so there is no drift however many merges are tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from raytvb.data import Split
from raytvb.encoder import Preprocess

SUBSETS_PER_SIZE = 4
BATCH = 256
LADDER = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)  # times 1/size


@dataclass(frozen=True)
class Count:
    """Correct answers out of a number of images."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of correct answers, 0 to 1."""
        return self.correct / self.total


def wilson(count: Count, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of an accuracy (95 % by default)."""
    p, n = count.accuracy, count.total
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, centre - reach)), min(1.0, max(p, centre + reach))  # rounding would leave p out at 0 and 1


def task_subsets(count: int, seed: int) -> dict[int, list[tuple[int, ...]]]:
    """Subsets of the tasks 0..count-1 by size, the same for every candidate: sizes 1, T/4, T/2 and T (rounded).

    Size 1 has every task once, size T the one full set, the others 4 different seeded subsets each (fewer where
    fewer exist).
    """
    sizes = sorted({1, max(1, round(count / 4)), max(1, round(count / 2)), count})
    subsets: dict[int, list[tuple[int, ...]]] = {}
    for size in sizes:
        wanted = count if size == 1 else min(SUBSETS_PER_SIZE, math.comb(count, size))
        if wanted == math.comb(count, size):
            subsets[size] = list(itertools.combinations(range(count), size))
            continue
        rng, chosen = np.random.default_rng([seed, size]), set[tuple[int, ...]]()
        while len(chosen) < wanted:
            chosen.add(tuple(sorted(rng.choice(count, size, replace=False).tolist())))
        subsets[size] = sorted(chosen)
    return subsets


class Evaluator:
    """An image tower with the heads and images of several tasks.

    `mask` gives the coordinates of directions: its kept entries, or every parameter where it is None.
    """

    def __init__(self, tower: nn.Module, heads: Mapping[str, Tensor], splits: Mapping[str, Split],
                 preprocess: Preprocess, *, mask: Mapping[str, Tensor] | None, device: torch.device) -> None:
        self._tower = tower.to(device).eval().requires_grad_(False)
        self._device, self._preprocess, self._splits = device, preprocess, splits
        self._heads = {n: h.to(device) for n, h in heads.items()}
        self._zero_shot: dict[str, Count] = {}
        named = sorted((f"visual.{n}", p) for n, p in tower.named_parameters())
        self._slots = [(p, None if mask is None else mask[n].reshape(-1).nonzero()[:, 0].to(device)) for n, p in named]
        self._base = torch.cat([p.reshape(-1) if i is None else p.reshape(-1)[i] for p, i in self._slots]).clone()

    def merge(self, direction: Tensor | None, alpha: float = 0.0) -> None:
        """Set the tower to theta_0 + alpha * direction (count,), or to theta_0."""
        values = self._base if direction is None else self._base + alpha * direction.to(self._device)
        sizes = [p.numel() if i is None else len(i) for p, i in self._slots]
        for (parameter, indices), part in zip(self._slots, values.split(sizes), strict=True):
            if indices is None:
                parameter.copy_(part.view_as(parameter))
            else:
                parameter.view(-1)[indices] = part

    def zero_shot(self, task: str) -> Count:
        """Correct answers of the pretrained tower, measured once; leaves the pretrained tower in place."""
        self.merge(None)
        if task not in self._zero_shot:
            self._zero_shot[task] = self.count(task)
        return self._zero_shot[task]

    @torch.inference_mode()
    def count(self, task: str) -> Count:
        """Correct answers of the present tower with the task's head on the task's images."""
        split, correct = self._splits[task], 0
        for images, labels in zip(split.images.split(BATCH), split.labels.split(BATCH), strict=True):
            features = nn.functional.normalize(self._tower(self._preprocess.normalise(images.to(self._device))), dim=-1)
            correct += int(((features @ self._heads[task].T).argmax(dim=1).cpu() == labels).sum())
        return Count(correct, len(split))


def coefficient_ladder(size: int, low: float, high: float) -> list[float]:
    """Coefficients to choose from for additions of `size` tasks: multiples of 1/size, where the best ones lie."""
    return sorted({min(max(m / size, low), high) for m in LADDER} - {0.0})


def climb(ladder: Sequence[float], start: int, value: Callable[[float], float]) -> dict[float, float]:
    """Line search for the maximum of a unimodal function on a ladder, from rung `start`: every value it looked at.

    Goes up while that is better, else down while that is better (or equal): a few evaluations instead of all.
    """
    tried = {ladder[start]: value(ladder[start])}
    for step in (1, -1):
        rung = start + step
        while 0 <= rung < len(ladder):
            tried[ladder[rung]] = value(ladder[rung])
            before = tried[ladder[rung - step]]
            if tried[ladder[rung]] < before or (step == 1 and tried[ladder[rung]] == before):
                break
            rung += step
        if rung - step != start:  # it went up: the other side is lower
            break
    return tried


def best_coefficient(tried: Mapping[float, float]) -> float:
    """The coefficient with the highest value; the smallest of equals."""
    return min(tried, key=lambda a: (-tried[a], a))


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, summed exactly, so that it does not depend on the order."""
    return math.fsum(values) / len(values)
