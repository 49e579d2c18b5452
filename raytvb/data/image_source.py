"""What every kind of data has in common: labelled images in one or several pools.

Images come from Parquet files, class folders, or torchvision's data sets. The first two may lie
under any fsspec URL (s3://, hf://datasets/OWNER/NAME). A *pool* is a named part of the data (train,
validation, test...). Data without such names are one pool, named ''. The module `splits` decides
which pools, or which shares of a pool, are train, val and test. A pool is read in one pass with a
bounded part in memory.
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
"""For each split, the pool names that mean it. The first name that the data have is used."""

USUAL_POOLS = frozenset(chain.from_iterable(ALIASES.values()))

ROWS_AT_ONCE = 64
"""Number of encoded images that one read brings into memory."""


@dataclass(frozen=True)
class Row:
    """One image with its label."""

    name: str
    """Where the image is, for messages."""
    image: object
    """Encoded bytes, an opened `PIL.Image`, or the exception that opening it raised. None or any
    other type, which a Parquet column may hold, is not a readable image."""
    label: object
    """Number or name of the class; anything else is an error in the data."""


class Source(Protocol):
    """Labelled images in one or several pools."""

    where: str
    """The place of the data, for messages."""

    @property
    def pools(self) -> tuple[str, ...]:
        """Names of the pools; '' for the one pool of data without named splits."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the labels. Raises UserError if there are none."""

    def count(self, pool: str) -> int:
        """Number of images in a pool, readable or not."""

    def rows(self, pool: str, positions: Sequence[int]) -> Iterator[Row]:
        """The images at these positions of a pool. Positions must rise. Little else is read."""


def keys_by_pool(
    task: TaskConfig, keys: Sequence[str], pool_of: Callable[[str], str]
) -> dict[str, list[str]]:
    """Keys by the name of their pool, which `pool_of` derives from a key.

    Usual names become lower case. If no pool has a usual name or a name from the task's `splits`,
    all keys are in one pool, ''.
    """
    pools: dict[str, list[str]] = {}
    for key in keys:
        name = pool_of(key)
        if name.lower() in USUAL_POOLS:
            name = name.lower()
        pools.setdefault(name, []).append(key)
    named = {task.splits.train, task.splits.val, task.splits.test}
    if pools.keys() & (USUAL_POOLS | named):
        return pools
    return {"": list(keys)}
