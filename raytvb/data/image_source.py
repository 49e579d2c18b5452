"""What every kind of data has in common: labelled images in one or several pools.

Images come from Parquet files, class folders, or torchvision's data sets. The first two may lie
under any fsspec URL (s3://, hf://datasets/OWNER/NAME). A *pool* is a named part of the data (train,
validation, test...). Data without such names are one pool, named ''. The module `splits` decides
which pools, or which shares of a pool, are train, val and test. A pool is read in one pass with a
bounded part in memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from raytvb.errors import UserError, listed, shortened
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

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

MOST_CLASSES = 50_000

BYTES_AT_ONCE = 2**26
"""Number of bytes of encoded images that are in memory before they are decoded, unless one image
alone has more."""

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
    """Number or name of one of the source's `classes`; anything else is an error in the data."""


class Source(Protocol):
    """Labelled images in one or several pools."""

    where: str
    """The place of the data, for messages."""

    @property
    def left_out(self) -> Mapping[str, int]:
        """Number of files under the URL that are not read, by the reason in a few words."""

    @property
    def warnings(self) -> Sequence[str]:
        """What users should know about how the data are taken, one sentence each. All files'
        headers are looked at.
        """

    @property
    def pools(self) -> tuple[str, ...]:
        """Names of the pools; '' for the one pool of data without named splits."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the labels. Raises UserError if there are none."""

    def count(self, pool: str) -> int:
        """Number of images in a pool, readable or not."""

    def labels(self, pool: str, positions: Sequence[int]) -> Iterator[object]:
        """The labels that `rows` would give, without reading an image."""

    def rows(self, pool: str, positions: Sequence[int]) -> Iterator[Row]:
        """The images at these positions of a pool. Positions must rise. Little else is read."""


def reasons(left_out: Mapping[str, int]) -> str:
    """What is left out, for a message: `2 broken links; 4 hidden files and folders`."""
    return "; ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))


def check_classes(task: TaskConfig, names: Sequence[str], where: str) -> None:
    """Raise UserError unless the class names of a task can be told apart.

    where: the place that the names come from, for messages.
    """
    place = f"task {task.name}: {where}"
    if len(names) > MOST_CLASSES:
        raise UserError(
            f"{place} has {len(names):,} classes: a task has at most {MOST_CLASSES:,}; check that "
            f"these are names of classes"
        )
    if len(names) < 2:
        raise UserError(
            f"{place} has only one class, {shortened(names[0])}: a task needs at least two"
            if names
            else f"{place} has no classes: a task needs at least two"
        )
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise UserError(
            f"{place} names {listed(map(shortened, doubled))} for two classes: give every class "
            f"its own name as `classes: [...]` of the task"
        )
    for number, name in enumerate(names):
        if not name.strip() or _UNPRINTABLE.search(name):
            raise UserError(
                f"{place} has the name {shortened(name)} for class {number}, which is blank or has "
                f"control characters: give names as `classes: [...]` of the task"
            )


def check_given_classes(task: TaskConfig, names: Sequence[str], where: str) -> None:
    """Raise UserError if the names that a task gives contradict those that the data have.

    names: of the data's classes, in the order of the labels. The given names replace them one by
    one. So another number of names is an error, and so is a name of the data in another place:
    the images would be trained under the name of another class.
    """
    given = task.classes
    assert given is not None
    both = f"`classes` gives {listed(given)}, and {where} has {listed(names)}"
    if len(given) != len(names):
        raise UserError(
            f"task {task.name}: {len(given)} `classes` are given for {len(names)} classes: {both}"
        )
    places = {name: number for number, name in enumerate(names)}
    for number, name in enumerate(given):
        if places.get(name, number) != number:
            raise UserError(
                f"task {task.name}: the names are in another order: {both}. The names in `classes` "
                f"replace those of the data one by one, so give them in that order, or leave "
                f"`classes` out"
            )
