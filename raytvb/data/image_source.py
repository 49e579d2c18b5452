"""What every kind of data has in common: labelled images in one or several pools.

Images come from Parquet files, folders with a folder per class, or torchvision's data sets. The
first two may lie under any fsspec URL (s3://, hf://datasets/OWNER/NAME). A *pool* is a part of the
data that has a name (train, validation, test...), or '' for all of it where there are no names;
`splits` decides which pools, or shares of one, are train, val and test. A pool is read in one pass
with a bounded part in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from raytvb.experiment.sections.tasks import TaskConfig

TORCHVISION = "torchvision:"

SPLITS = ("train", "val", "test")

ALIASES = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""Names of pools that are taken for a split, the first one that there is."""

USUAL_POOLS = frozenset(chain.from_iterable(ALIASES.values()))

ROWS_AT_ONCE = 64
"""Encoded images in memory: what one read asks for."""


@dataclass(frozen=True)
class Row:
    """One image with its label."""

    name: str
    """Where it is, for messages."""
    image: object
    """Encoded bytes, an opened `PIL.Image`, or the exception that opening it raised. None or any
    other type, as a Parquet column may hold it, is no readable image."""
    label: object
    """Number or name of the class, if the data are sound."""


class Source(Protocol):
    """Labelled images in one or several pools."""

    where: str
    """The place of the data, for messages."""

    @property
    def pools(self) -> tuple[str, ...]:
        """Names of the pools; '' for the one pool of data without named splits."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the labels. Raises UserError where there are none."""

    def count(self, pool: str) -> int:
        """Number of images of a pool, readable or not."""

    def rows(self, pool: str, positions: Sequence[int]) -> Iterator[Row]:
        """The images at these positions of a pool, which must rise; little else is read."""


def keys_by_pool(
    task: TaskConfig, keys: Sequence[str], pool_of: Callable[[str], str]
) -> dict[str, list[str]]:
    """Keys by the name of their pool, as `pool_of` reads it from a key; usual names in lower case.

    Where no pool has a usual name or one that the task's `splits` give, all keys are in one pool,
    ''.
    """
    pools: dict[str, list[str]] = {}
    for key in keys:
        name = pool_of(key)
        if name.lower() in USUAL_POOLS:
            name = name.lower()
        pools.setdefault(name, []).append(key)
    given = {task.splits.train, task.splits.val, task.splits.test}
    if pools.keys() & (USUAL_POOLS | given):
        return pools
    return {"": list(keys)}
