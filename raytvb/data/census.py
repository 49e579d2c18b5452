"""What the data of a task hold: images by class and split, what is left out, what looks wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from raytvb.data.decoding import Inspected, inspected_rows
from raytvb.data.folders import BESIDE
from raytvb.data.image_source import SPLITS, Row, Source, reasons
from raytvb.data.opening import Unreadable
from raytvb.data.splits import (
    Part,
    check_unreadable,
    class_number,
    require_split,
    split_parts,
    task_source,
)
from raytvb.errors import UserError, listed
from raytvb.experiment.sections.data import DataConfig
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.storage.contract import JsonObject
from raytvb.suite.glyphs import class_counts
from raytvb.suite.task_names import class_names


@dataclass
class Census:
    """What the data of a task hold."""

    classes: dict[str, dict[str, int]]
    """Number of images by class and split. Images that cannot be read do not count."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of files or images that are not used, by the reason."""
    warnings: list[str] = field(default_factory=list)
    """What users should look at, one sentence each."""

    def count(self, split: str) -> int:
        """Number of images in a split."""
        return sum(counts.get(split, 0) for counts in self.classes.values())

    def lines(self) -> list[str]:
        """What is left out and the warnings, as lines of text."""
        lines = [f"warning: {warning}" for warning in self.warnings]
        return [*lines, f"left out: {reasons(self.left_out)}"] if self.left_out else lines

    def to_json(self) -> JsonObject:
        """The census as JSON values."""
        classes: JsonObject = {name: {**counts} for name, counts in self.classes.items()}
        return {
            "classes": classes,
            "left_out": {**self.left_out},
            "warnings": [*self.warnings],
        }


class _Picture(NamedTuple):
    """An image that was decoded."""

    digest: bytes
    """Of its pixels."""
    label: int
    name: str


def take_census(
    task: TaskConfig,
    reading: DataConfig,
    threads: int,
    *,
    splits: Sequence[str] = (),
    decode: bool = True,
) -> Census:
    """Count the images of a task.

    The embedded suite is known, so nothing of it is drawn.

    Args:
        reading: how images are read.
        threads: number of images that are decoded at the same time.
        splits: those that the data must have.
        decode: whether every image is decoded. If not, unreadable images count as images, and
            nothing is known of images that are in two splits.

    Raises UserError for data that cannot be used: without one of the splits, without class names,
    with labels outside the classes, with more unreadable images than `max_corrupt`, or, if
    `data.leaks` is `error`, with images that are in test and in another split.
    """
    if task.data is None:
        return _of_suite(task)
    source = task_source(task)
    parts = split_parts(task, source)
    # This reads all headers, so that files which cannot be used are named before missing splits.
    count = _Count(task, source, parts, reading, threads, decode)
    for split in splits:
        require_split(task, source, parts, split)
    census = count.taken()
    for split in splits:
        if not census.count(split):
            left_out = reasons(census.left_out) or "nothing"
            raise UserError(
                f"task {task.name}: the {split} split under {source.where} has no image that can "
                f"be read (left out: {left_out}): add images, or say with `splits:` what is {split}"
            )
    return census


def _of_suite(task: TaskConfig) -> Census:
    names = task.classes or class_names(task.name)
    classes: dict[str, dict[str, int]] = {}
    for label, name in enumerate(names):
        counts = classes.setdefault(name, {})
        for split in SPLITS:
            counts[split] = counts.get(split, 0) + class_counts(task.name, split)[label]
    return Census(classes)


class _Count:
    """Counts the images of one task."""

    def __init__(
        self,
        task: TaskConfig,
        source: Source,
        parts: Mapping[str, Part],
        reading: DataConfig,
        threads: int,
        decode: bool,
    ) -> None:
        self._task = task
        self._source = source
        self._reading = reading
        self._threads = threads
        self._decode = decode
        self._parts = parts
        self._classes = source.classes
        self._counts = {split: [0] * len(self._classes) for split in self._parts}
        self._left_out = Counter(source.left_out)
        self._notes: dict[str, Counter[str]] = {}
        self._unreadable: dict[str, list[str]] = {split: [] for split in self._parts}
        self._pictures: dict[str, list[_Picture]] = {split: [] for split in self._parts}

    def taken(self) -> Census:
        """The census."""
        for pool in self._source.pools:
            self._count_pool(pool)
        classes = {}
        for label, name in enumerate(self._classes):
            classes[name] = {split: counts[label] for split, counts in self._counts.items()}
        warnings = [*self._source.warnings, *self._empty_classes(), *self._unusual()]
        warnings += [*self._contradictions(), *self._copies()]
        leaks = self._leaks()
        if leaks and self._reading.leaks == "error":
            raise UserError(
                f"task {self._task.name}: {leaks}; remove them from one of the splits, or set "
                f"`data: {{leaks: warn}}`"
            )
        return Census(classes, self._left_out, [*warnings, *([leaks] if leaks else [])])

    def _count_pool(self, pool: str) -> None:
        parts = {split: part for split, part in self._parts.items() if part.pool == pool}
        if not parts:
            place = "beside the splits" if pool == BESIDE else f"in {pool}"
            self._left_out[f"{place}, which no split uses"] += self._source.count(pool)
            return
        positions, splits = self._members(parts)
        if self._decode:
            rows = self._source.rows(pool, positions)
            for split, (row, seen) in zip(
                splits, inspected_rows(rows, self._threads, self._reading), strict=True
            ):
                self._count_image(split, row, seen)
            return
        for split, label in zip(splits, self._source.labels(pool, positions), strict=True):
            self._count_label(split, Row(f"an image of {split}", None, label))

    def _members(self, parts: dict[str, Part]) -> tuple[list[int], Iterator[str]]:
        """Rising positions in a pool, and the split of each."""
        members = [part.members(self._source, self._task.splits.seed) for part in parts.values()]
        positions = np.concatenate(members)
        owners = np.repeat(np.arange(len(parts)), [len(each) for each in members])
        order = np.argsort(positions, kind="stable")
        names = list(parts)
        return positions[order].tolist(), (names[owner] for owner in owners[order])

    def _count_label(self, split: str, row: Row) -> int:
        label = class_number(self._task, self._classes, row)
        self._counts[split][label] += 1
        return label

    def _count_image(self, split: str, row: Row, seen: Inspected | Unreadable) -> None:
        if isinstance(seen, Unreadable):
            self._left_out[seen.kind] += 1
            self._unreadable[split].append(f"{row.name} is not a readable image: {seen.reason}")
            check_unreadable(self._task, split, self._unreadable[split])
            return
        label = self._count_label(split, row)
        self._pictures[split].append(_Picture(seen.digest, label, row.name))
        for note in seen.notes:
            self._notes.setdefault(note, Counter())[split] += 1

    def _empty_classes(self) -> list[str]:
        """A warning for each split in which classes have no image."""
        lines = []
        for split, counts in self._counts.items():
            names = [name for name, count in zip(self._classes, counts, strict=True) if not count]
            if names:
                lines.append(f"no image of {split} is in {_classes(len(names))} {listed(names)}")
        return lines

    def _unusual(self) -> list[str]:
        lines = []
        for note, splits in self._notes.items():
            where = ", ".join(f"{count} in {split}" for split, count in splits.items())
            lines.append(f"{_images(splits.total())} {note} ({where})")
        return lines

    def _contradictions(self) -> list[str]:
        """A warning if images of different classes have the same pixels."""
        first: dict[bytes, tuple[str, _Picture]] = {}
        pairs = []
        for split, pictures in self._pictures.items():
            for picture in pictures:
                other_split, other = first.setdefault(picture.digest, (split, picture))
                if other.label != picture.label:
                    place = self._place(split, picture)
                    pairs.append(f"{place} is {self._place(other_split, other)}")
        if not pairs:
            return []
        have = "has" if len(pairs) == 1 else "have"
        return [f"{_images(len(pairs))} {have} the pixels of another class: {_pairs(pairs)}"]

    def _place(self, split: str, picture: _Picture) -> str:
        return f"{picture.name} of {split} ({self._classes[picture.label]})"

    def _copies(self) -> list[str]:
        """A warning for each split that has the same pixels more than once."""
        lines = []
        for split, pictures in self._pictures.items():
            first: dict[bytes, str] = {}
            pairs = []
            for picture in pictures:
                if first.setdefault(picture.digest, picture.name) != picture.name:
                    pairs.append(f"{picture.name} is {first[picture.digest]}")
            if pairs:
                lines.append(f"{_images(len(pairs))} of {split} are copies: {_pairs(pairs)}")
        return lines

    def _leaks(self) -> str:
        """The images of test that are also in train or val; '' if there are none."""
        others: dict[bytes, str] = {}
        for split in ("val", "train"):
            for picture in self._pictures.get(split, ()):
                others[picture.digest] = f"{picture.name} of {split}"
        pairs = []
        for picture in self._pictures.get("test", ()):
            if picture.digest in others:
                pairs.append(f"{picture.name} is {others[picture.digest]}")
        if not pairs:
            return ""
        return f"{_images(len(pairs))} of test have the pixels of others: {_pairs(pairs)}"


def _pairs(pairs: Sequence[str]) -> str:
    """Images and their twins; paths may be long."""
    return listed(pairs, longest=1000)


def _images(count: int) -> str:
    return f"{count:,} image{'s' if count > 1 else ''}"


def _classes(count: int) -> str:
    return "class" if count == 1 else f"{count} classes:"
