"""Reads, decodes and resizes a split.

Decoded images lie in a temporary file that is mapped into memory, so the operating system can drop
them from memory and read them again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
from torch import Tensor

from raytvb.data.decoding import AS_USUAL, decoded_rows
from raytvb.data.image_source import Row, Source
from raytvb.data.opening import Unreadable
from raytvb.data.preprocess import Preprocess
from raytvb.data.splits import (
    Part,
    Split,
    check_unreadable,
    class_number,
    require_split,
    split_parts,
    task_source,
)
from raytvb.errors import UserError
from raytvb.experiment.sections.data import DataConfig
from raytvb.experiment.sections.tasks import TaskConfig

Decode: TypeAlias = Callable[[Iterator[Row]], Iterator[tuple[Row, np.ndarray | Unreadable]]]


def load_split(
    task: TaskConfig,
    split: str,
    preprocess: Preprocess,
    *,
    threads: int = 1,
    sample: int | None = None,
    generator: torch.Generator | None = None,
    reading: DataConfig = AS_USUAL,
) -> Split:
    """Read, decode and resize a split, or a random sample of it.

    The images lie in an unnamed temporary file ($TMPDIR) of N * 3 * S * S bytes, mapped into
    memory. Images that cannot be read are counted and left out, so N may be less than `sample`.

    Args:
        threads: number of images that are decoded at the same time.
        sample: number of images to draw, which come in the order of the draw; None: all images.
        generator: draws the sample; None: torch's global generator.
        reading: how images are read.

    Raises UserError for a split that is missing or empty, for a label outside the classes, and for
    more unreadable images than the task's `max_corrupt`.
    """
    source = task_source(task)
    parts = split_parts(task, source)
    require_split(task, source, parts, split)
    part = parts[split]
    members = part.members(source, task.splits.seed)
    if not len(members):
        raise UserError(f"task {task.name}: the {split} split under {source.where} is empty")
    decode = partial(decoded_rows, preprocess=preprocess, threads=threads, reading=reading)
    reader = _Reader(task, split, source, decode, preprocess.size)
    if sample is None:
        return reader.read(part, members)[0]
    drawn = members[torch.randperm(len(members), generator=generator)[:sample].numpy()]
    images, positions = reader.read(part, np.sort(drawn))
    return _in_order(images, positions, drawn)


class _Reader:
    """Reads images of one split of a task."""

    def __init__(
        self, task: TaskConfig, split: str, source: Source, decode: Decode, side: int
    ) -> None:
        """side: of the square images in pixels, S."""
        self._task = task
        self._split = split
        self._source = source
        self._decode = decode
        self._side = side
        self._classes = source.classes

    def read(self, part: Part, positions: np.ndarray) -> tuple[Split, list[int]]:
        """The readable images at rising positions of the part's pool, and their positions."""
        labels, readable, unreadable = list[int](), list[int](), list[str]()
        rows = self._source.rows(part.pool, positions.tolist())
        decoded = self._decode(rows)
        with tempfile.TemporaryFile(prefix="raytvb-images-") as file:
            for position, (row, image) in zip(positions, decoded, strict=True):
                if isinstance(image, Unreadable):
                    unreadable.append(f"{row.name} is not a readable image: {image.reason}")
                    check_unreadable(self._task, self._split, unreadable)
                    continue
                labels.append(class_number(self._task, self._classes, row))
                readable.append(int(position))
                file.write(image.data)
            if not readable:
                raise UserError(
                    f"task {self._task.name}: the {self._split} split under {self._source.where} "
                    f"is empty: {unreadable[0]}"
                )
            images = self._mapped(file, len(readable))
        split = Split(
            images, torch.tensor(labels, dtype=torch.int64), self._classes, len(unreadable)
        )
        return split, readable

    def _mapped(self, file: BinaryIO, count: int) -> Tensor:
        """The file's images (N, 3, S, S) uint8. They stay valid when the file is closed."""
        file.flush()
        shape = (count, 3, self._side, self._side)
        return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r+", shape=shape))


def _in_order(images: Split, positions: list[int], drawn: np.ndarray) -> Split:
    """The images, which come in the order of `positions`, in the order of `drawn`.

    Drawn positions that are not in `positions` could not be read.
    """
    index_of = {position: index for index, position in enumerate(positions)}
    order = torch.tensor([index_of[int(p)] for p in drawn if int(p) in index_of])
    return Split(images.images[order], images.labels[order], images.classes, images.skipped)
