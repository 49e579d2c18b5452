"""Which images of a task are train, val and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raytvb.data.image_source import ALIASES, SPLITS, Source
from raytvb.data.open_source import open_source
from raytvb.data.suite_files import cache_folder, task_url
from raytvb.errors import UserError
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.suite.task_names import class_names

VAL_SHARE = 0.1
"""Share of the training images that are val, where a task has no validation images."""

TEST_SHARE = 0.2
"""Share of all images that are test, where the data have no named splits."""


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


@dataclass(frozen=True)
class Part:
    """A split as a part of a pool: what lies between two shares of its seeded permutation. From 0
    to 1 it is the whole pool.
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
        first = _edge(count, self.start)
        end = max(_edge(count, self.stop), first + 1)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
        return np.sort(order[first:end])


def _edge(count: int, share: float) -> int:
    """How many of `count` images a share is; at least one, but for the shares 0 and 1."""
    images = round(count * share)
    return images if share in (0.0, 1.0) else max(1, images)


def task_source(task: TaskConfig) -> Source:
    """The data of a task; those of the embedded suite are drawn first. Raises as `open_source`."""
    return open_source(task, task_url(task), cache_folder())


def task_classes(task: TaskConfig) -> tuple[str, ...]:
    """Class names of a task. Raises UserError where there are none, or no images."""
    if task.data is None:
        return task.classes or class_names(task.name)
    return task_source(task).classes


def check_task(task: TaskConfig, splits: Sequence[str]) -> tuple[str, ...]:
    """Class names of a task whose data has the splits.

    Raises UserError where a split is missing. No image is read.
    """
    if task.data is not None:
        source = task_source(task)
        parts = split_parts(task, source)
        for split in splits:
            require_split(task, source, parts, split)
    return task_classes(task)


def require_split(task: TaskConfig, source: Source, parts: Mapping[str, Part], split: str) -> None:
    """Raise UserError where a split is missing; it says what there is instead, and how to name
    one.
    """
    if split in parts:
        return
    pools = []
    for pool in filter(None, source.pools):
        used_for = _split_of(pool, parts)
        pools.append(f"{pool} (taken for {used_for})" if used_for else pool)
    is_share_possible = split != "train" and "train" in parts
    allowed = "NAME or a share of train, such as 0.1" if is_share_possible else "NAME"
    raise UserError(
        f"task {task.name}: no {split} split under {source.where} (there is {', '.join(pools)}); "
        f"`splits: {{{split}: {allowed}}}` of the task says what to use"
    )


def _split_of(pool: str, parts: Mapping[str, Part]) -> str | None:
    """The first split that takes images of a pool."""
    for split in SPLITS:
        if split in parts and parts[split].pool == pool:
            return split
    return None


def split_parts(task: TaskConfig, source: Source) -> dict[str, Part]:
    """What is train, val and test: what the task's `splits` say, else the pools of the usual names.

    A missing val is a tenth of train's pool; data without any named splits gives a fifth to test as
    well. A split that is not there is left out. Raises UserError for a name that the data does not
    have.
    """
    pools = _split_pools(task, source)
    parts = {split: Part(pool) for split, pool in pools.items() if split != "train"}
    if "train" not in pools:
        return parts
    shares = {"test": task.splits.test, "val": task.splits.val}
    if shares["test"] is None and source.pools == ("",):
        shares["test"] = TEST_SHARE
    if shares["val"] is None:
        shares["val"] = VAL_SHARE
    used = 0.0
    for split, share in shares.items():
        if split not in parts and isinstance(share, float):
            parts[split] = Part(pools["train"], used, used + share)
            used += share
    parts["train"] = Part(pools["train"], used)
    return parts


def _split_pools(task: TaskConfig, source: Source) -> dict[str, str]:
    """The pools that are splits by their names; splits that have none, or are shares, are left
    out.
    """
    given = _given_pools(task, source)
    pools = dict(given)
    for split in SPLITS:
        if getattr(task.splits, split) is not None:
            continue
        for alias in ALIASES[split]:
            if alias in source.pools and alias not in given.values():
                pools[split] = alias
                break
    if source.pools == ("",):
        pools["train"] = ""
    return pools


def _given_pools(task: TaskConfig, source: Source) -> dict[str, str]:
    """The pools that the task names for its splits. The usual names are found in any case."""
    given: dict[str, str] = {}
    unknown = []
    for split in SPLITS:
        pool = getattr(task.splits, split)
        if not isinstance(pool, str):
            continue
        if pool not in source.pools:
            pool = pool.lower()
        if pool in source.pools:
            given[split] = pool
        else:
            unknown.append(f"splits.{split}: {getattr(task.splits, split)}")
    if unknown:
        pools = ", ".join(filter(None, source.pools)) or "no named splits"
        raise UserError(
            f"task {task.name}: {', '.join(unknown)}: {source.where} has {pools} (a share of train "
            f"is a number, such as 0.1)"
        )
    return given
