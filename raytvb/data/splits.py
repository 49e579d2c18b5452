"""Which images of a task are train, val and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raytvb.data.image_source import SPLITS, Row, Source, reasons
from raytvb.data.open_source import open_source
from raytvb.data.pools import split_pools
from raytvb.data.suite_files import cache_folder, task_url
from raytvb.errors import UserError
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.suite.task_names import class_names

VAL_SHARE = 0.1
"""Share of the training images that become val, if a task has no validation images."""

TEST_SHARE = 0.2
"""Share of all images that become test, if the data have no named splits."""


@dataclass(frozen=True)
class Split:
    """Images (N, 3, S, S) uint8 at the model's resolution and labels (N,) int64 in
    range(len(classes)).

    `skipped` is the number of images that could not be read; `images` does not contain them.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Part:
    """A split as a part of a pool: a share of the images of the pool's seeded permutation.

    With share 1 and nothing before it, it is the whole pool.
    """

    pool: str
    before: tuple[float, ...] = ()
    """The shares of the parts that come before it in the permutation, in their order."""
    share: float | None = None
    """None: all that is left."""

    def members(self, source: Source, seed: int) -> np.ndarray:
        """Positions (N,) in the pool, rising. No two parts of a pool have one in common.

        Every part with a share gets at least one image, as long as there are any.
        """
        count = source.count(self.pool)
        if self.share is None and not self.before:
            return np.arange(count)
        first, total = 0, 0.0
        for share in self.before:
            total += share
            first = max(round(count * total), first + 1)
        end = count
        if self.share is not None:
            end = max(round(count * (total + self.share)), first + 1)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
        return np.sort(order[first:end])


def task_source(task: TaskConfig) -> Source:
    """The data of a task. Those of the embedded suite are drawn first. Raises as `open_source`."""
    return open_source(task, task_url(task), cache_folder())


def task_classes(task: TaskConfig) -> tuple[str, ...]:
    """Class names of a task. Raises UserError if there are no class names or no images."""
    if task.data is None:
        return task.classes or class_names(task.name)
    return task_source(task).classes


def class_number(task: TaskConfig, classes: Sequence[str], row: Row) -> int:
    """Number of a row's class, in range(len(classes)). Raises UserError for other labels."""
    if isinstance(row.label, str) and row.label in classes:
        return classes.index(row.label)
    if not isinstance(row.label, int):
        raise UserError(
            f"task {task.name}: {row.name} has label {row.label!r}; labels are integers, 0 for the "
            f"first class, or names of `classes`"
        )
    if not 0 <= row.label < len(classes):
        raise UserError(
            f"task {task.name}: {row.name} has label {row.label!r}, but there are {len(classes)} "
            f"classes"
        )
    return int(row.label)


def check_unreadable(task: TaskConfig, split: str, unreadable: Sequence[str]) -> None:
    """Raise UserError if more images of a split cannot be read than `max_corrupt` allows.

    unreadable: one sentence for each of these images.
    """
    if len(unreadable) <= task.max_corrupt:
        return
    others = f", and {len(unreadable) - 1} more of {split}" if len(unreadable) > 1 else ""
    raise UserError(
        f"task {task.name}: {unreadable[0]}{others}; up to `max_corrupt: {task.max_corrupt}` of a "
        f"split are skipped"
    )


def require_split(task: TaskConfig, source: Source, parts: Mapping[str, Part], split: str) -> None:
    """Raise UserError if a split is missing. The message lists the pools and says what to do."""
    if split in parts:
        return
    pools = []
    for pool in filter(None, source.pools):
        used_for = _split_of(pool, parts)
        pools.append(f"{pool} (used for {used_for})" if used_for else pool)
    is_share_possible = split != "train" and "train" in parts
    allowed = "NAME or a share of train, such as 0.1" if is_share_possible else "NAME"
    left_out = f"; left out: {reasons(source.left_out)}" if source.left_out else ""
    found = f"there is {', '.join(pools)}{left_out}"
    raise UserError(
        f"task {task.name}: no {split} split under {source.where} ({found}); "
        f"`splits: {{{split}: {allowed}}}` of the task says what to use"
    )


def _split_of(pool: str, parts: Mapping[str, Part]) -> str | None:
    """The first split that takes images of a pool."""
    for split in SPLITS:
        if split in parts and parts[split].pool == pool:
            return split
    return None


def split_parts(task: TaskConfig, source: Source) -> dict[str, Part]:
    """The parts that are train, val and test.

    The task's `splits` decide; else the pools with the usual names are taken. If val is missing, it
    becomes a tenth of train's pool. If the data have no named splits, test becomes a fifth of them.
    Other missing splits are left out. Raises UserError for a name that the data do not have.
    """
    pools = split_pools(task, source.pools, source.where)
    parts = {split: Part(pool) for split, pool in pools.items() if split != "train"}
    if "train" not in pools:
        return parts
    shares = {"test": task.splits.test, "val": task.splits.val}
    if shares["test"] is None and source.pools == ("",):
        shares["test"] = TEST_SHARE
    if shares["val"] is None:
        shares["val"] = VAL_SHARE
    before: tuple[float, ...] = ()
    for split, share in shares.items():
        if split not in parts and isinstance(share, float):
            parts[split] = Part(pools["train"], before, share)
            before += (share,)
    parts["train"] = Part(pools["train"], before)
    return parts
