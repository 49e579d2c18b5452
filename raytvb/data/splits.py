"""Which images of a task are train, val and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raytvb.data.opening import open_source
from raytvb.data.source import ALIASES, SPLITS, Source
from raytvb.data.suite_files import cache_folder, task_url
from raytvb.errors import UserError
from raytvb.experiment.tasks import TaskConfig
from raytvb.suite import glyphs

VAL_SHARE, TEST_SHARE = (
    0.1,
    0.2,
)  # of the training images, where a task has no validation, or no named splits at all


@dataclass(frozen=True)
class Split:
    """Images (N, 3, S, S) uint8 at the model's resolution and labels (N,) int64 in
    range(len(classes)).

    `skipped` images of the split could not be read and are not among them.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)


def task_source(task: TaskConfig) -> Source:
    return open_source(task, task_url(task), cache_folder())


def task_classes(task: TaskConfig) -> tuple[str, ...]:
    """Class names of a task. Raises UserError where there are none, or no images."""
    if task.data is None:
        return task.classes or glyphs.class_names(task.name)
    return task_source(task).classes


def check_task(task: TaskConfig, splits: Sequence[str]) -> tuple[str, ...]:
    """Class names of a task whose data has the splits. Raises UserError where it has not, without
    reading images.
    """
    if task.data is not None:
        source = task_source(task)
        parts = split_parts(task, source)
        for split in splits:
            require_split(task, source, parts, split)
    return task_classes(task)


def require_split(task: TaskConfig, source: Source, parts: Mapping[str, Part], split: str) -> None:
    """Raise UserError that says what there is instead of a split, and how to name one."""
    if split not in parts:
        taken = {part.pool: s for s, part in parts.items()}
        there = ", ".join(
            f"{p} (taken for {taken[p]})" if p in taken else p for p in source.pools if p
        )
        allowed = (
            "NAME"
            if split == "train" or "train" not in parts
            else "NAME or a share of train, such as 0.1"
        )
        raise UserError(
            f"task {task.name}: no {split} split under {source.where} (there is {there}); "
            f"`splits: {{{split}: {allowed}}}` of the task says what to use"
        )


@dataclass(frozen=True)
class Part:
    """A split as the part of a pool between two shares of its seeded permutation; from 0 to 1 it is
    the whole pool.
    """

    pool: str
    start: float = 0.0
    stop: float = 1.0

    def members(self, source: Source, seed: int) -> np.ndarray:
        """Positions in the pool, rising (N,). Every part of a pool that is not empty gets at least
        one image.
        """
        count = source.count(self.pool)
        if (self.start, self.stop) == (0.0, 1.0):
            return np.arange(count)
        edges = [
            round(count * share) if share in (0.0, 1.0) else max(1, round(count * share))
            for share in (self.start, self.stop)
        ]
        edges[1] = max(edges[1], edges[0] + 1)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
        return np.sort(order[edges[0] : edges[1]])


def split_parts(task: TaskConfig, source: Source) -> dict[str, Part]:
    """What is train, val and test: what the task's `splits` say, else the pools of the usual names.

    A missing val is a tenth of train's pool; data without any named splits gives a fifth to test as
    well. A split that is not there is left out. Raises UserError for a name that the data does not
    have.
    """
    asked = {s: getattr(task.splits, s) for s in SPLITS}
    lower = {s: n.lower() for s, n in asked.items() if isinstance(n, str) and n not in source.pools}
    asked |= {
        s: n for s, n in lower.items() if n in source.pools
    }  # the usual names are found in any case
    unknown = {s: n for s, n in asked.items() if isinstance(n, str) and n not in source.pools}
    if unknown:
        there = ", ".join(p for p in source.pools if p) or "no named splits"
        raise UserError(
            f"task {task.name}: splits.{', splits.'.join(f'{s}: {n}' for s, n in unknown.items())}: "
            f"{source.where} has {there} (a share of train is a number, such as 0.1)"
        )
    taken = {n for n in asked.values() if isinstance(n, str)}
    names = {
        s: asked[s]
        if isinstance(asked[s], str)
        else next((a for a in ALIASES[s] if a in source.pools and a not in taken), None)
        if asked[s] is None
        else None
        for s in SPLITS
    }
    unnamed = source.pools == ("",)
    names["train"] = "" if unnamed else names["train"]
    found = {s: Part(n) for s, n in names.items() if n is not None and s != "train"}
    if names["train"] is None:
        return found
    default = {"val": VAL_SHARE, "test": TEST_SHARE if unnamed else None}
    used = 0.0
    for split in ("test", "val"):
        share = asked[split] if asked[split] is not None else default[split]
        if split not in found and share is not None:
            found[split] = Part(names["train"], used, used + share)
            used += share
    return found | {"train": Part(names["train"], used)}
