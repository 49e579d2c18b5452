"""Images decoded and resized for a model, several at a time, each within a time limit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import TimeoutError as LateError
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from raytvb.data.image_source import BYTES_AT_ONCE, Row
from raytvb.data.opening import (
    Unreadable,
    open_image,
    rgb_image,
    rgb_strips,
    weighed_pixels,
    why_unreadable,
)
from raytvb.data.preprocess import Preprocess
from raytvb.errors import UserError, listed
from raytvb.experiment.sections.data import DataConfig

AS_USUAL = DataConfig()
"""How images are read if an experiment does not say."""

LONGEST_S = 12.0
"""Seconds that decoding one image may take. A damaged file of a few kilobytes can keep a decoder
busy for minutes."""

MOST_SLOW = 1
"""Number of images that may take longer. With one more the data are refused: each keeps a thread
and its memory until it has ended."""

TOGETHER = 8
"""Number of images that are given to a thread at once."""

LONGEST_TOGETHER_S = 5.0
"""Seconds for such a group of small images. If it takes longer, each is decoded alone."""

LARGE = 2**21
"""Number of pixels above which an image is large. Of smaller ones, every thread may hold one."""

LARGE_TOGETHER = 2**26
"""Number of pixels of the large images that are decoded at a time, unless one alone has more. Each
pixel takes up to 8 bytes."""

T = TypeVar("T")

Step: TypeAlias = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Inspected:
    """What is known of a readable image without its pixels."""

    digest: bytes
    """Hash of the decoded RGB pixels and their arrangement. Equal for equal pictures, also if they
    are encoded in different ways without loss."""
    notes: tuple[str, ...]
    """What was unusual about the image, in a few words."""


def decoded_rows(
    rows: Iterator[Row], preprocess: Preprocess, threads: int, reading: DataConfig = AS_USUAL
) -> Iterator[tuple[Row, np.ndarray | Unreadable]]:
    """The rows in their order, each with its decoded image (3, S, S) uint8.

    threads: number of images that are decoded at the same time.
    """
    work = partial(_pixels, preprocess=preprocess, reading=reading)
    return _with_each(rows, work, threads, reading)


def inspected_rows(
    rows: Iterator[Row], threads: int, reading: DataConfig
) -> Iterator[tuple[Row, Inspected | Unreadable]]:
    """The rows in their order, each with what is known after it was decoded."""
    return _with_each(rows, partial(_inspected, reading=reading), threads, reading)


def _pixels(image: Image.Image, preprocess: Preprocess, reading: DataConfig) -> np.ndarray:
    """An opened image as (3, S, S) uint8."""
    image = rgb_image(image, reading)
    if image.size != (preprocess.size, preprocess.size) or image.mode != "RGB":
        for step in _geometry(preprocess.config_text):
            image = step(image)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def _inspected(image: Image.Image, reading: DataConfig) -> Inspected:
    digest, notes = hashlib.blake2b(digest_size=16), list[str]()
    width, height = 0, 0
    for strip in rgb_strips(image, reading, notes):
        digest.update(strip.convert("RGB").tobytes())
        width, height = strip.width, height + strip.height
    digest.update(repr((width, height)).encode())
    return Inspected(digest.digest(), tuple(notes))


def _with_each(
    rows: Iterator[Row], work: Callable[[Image.Image], T], threads: int, reading: DataConfig
) -> Iterator[tuple[Row, T | Unreadable]]:
    """Each row with the result of work on its opened image, or why it could not be read."""
    pool = _Pool(work, threads, reading)
    try:
        for batch in _batches(rows, TOGETHER * threads):
            groups = [batch[start : start + TOGETHER] for start in range(0, len(batch), TOGETHER)]
            for group, results in zip(groups, pool.results(groups), strict=True):
                yield from zip(group, results, strict=True)
    finally:
        pool.close()


def _batches(rows: Iterator[Row], most: int) -> Iterator[list[Row]]:
    """The rows in batches of at most this many, and of a few bytes."""
    batch, total = list[Row](), 0
    for row in rows:
        batch.append(row)
        total += len(row.image) if isinstance(row.image, bytes) else 0
        if len(batch) == most or total > BYTES_AT_ONCE:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class _Large(NamedTuple):
    """An image that was left for later, since several of its size would fill the memory."""

    pixels: int


class _Pool(Generic[T]):
    """Threads that work on rows. A thread that takes too long is left behind."""

    def __init__(self, work: Callable[[Image.Image], T], threads: int, reading: DataConfig) -> None:
        self._work = work
        self._threads = threads
        self._reading = reading
        self._pool = ThreadPool(threads)
        self._slow = list[str]()

    def results(self, groups: Sequence[Sequence[Row]]) -> Iterator[list[T | Unreadable]]:
        """The results of each group of rows."""
        pending = [self._start(group, LARGE) for group in groups]
        for index, group in enumerate(groups):
            try:
                yield self._with_large(group, pending[index].get(LONGEST_TOGETHER_S))
            except LateError:
                self._renew()
                yield [self._alone(row) for row in group]
                for later in range(index + 1, len(groups)):
                    if not pending[later].ready():
                        pending[later] = self._start(groups[later], LARGE)

    def _start(
        self, rows: Sequence[Row], most: int | None
    ) -> AsyncResult[list[T | Unreadable | _Large]]:
        """Begin the work on rows. most: number of pixels up to which it is done; None: any."""
        return self._pool.apply_async(lambda: [self._tried(row, most) for row in rows])

    def _with_large(
        self, rows: Sequence[Row], found: Sequence[T | Unreadable | _Large]
    ) -> list[T | Unreadable]:
        """The results, those of large images included. As many of these are decoded at a time as
        fit into the memory for them.
        """
        results = list(found)
        together, pixels = list[int](), 0
        for index, result in enumerate(found):
            if not isinstance(result, _Large):
                continue
            if together and (
                len(together) == self._threads or pixels + result.pixels > LARGE_TOGETHER
            ):
                self._put(results, rows, together)
                together, pixels = [], 0
            together.append(index)
            pixels += result.pixels
        self._put(results, rows, together)
        return [result for result in results if not isinstance(result, _Large)]

    def _put(
        self, results: list[T | Unreadable | _Large], rows: Sequence[Row], together: Sequence[int]
    ) -> None:
        """Decode these images at the same time, and put them into the results."""
        pending = {index: self._start([rows[index]], None) for index in together}
        for index, work in pending.items():
            results[index] = self._waited(rows[index], work)

    def _alone(self, row: Row) -> T | Unreadable:
        """The result of one row. Others of its group took too long, or it did itself."""
        return self._waited(row, self._start([row], None))

    def _waited(self, row: Row, work: AsyncResult[list[T | Unreadable | _Large]]) -> T | Unreadable:
        try:
            (result,) = work.get(LONGEST_S)
            assert not isinstance(result, _Large)
            return result
        except LateError:
            self._renew()
            self._slow.append(row.name)
            if len(self._slow) > MOST_SLOW:
                raise UserError(
                    f"{listed(self._slow)} each take longer than {LONGEST_S:g} s to decode: remove "
                    f"them, or save them again in a simpler form"
                ) from None
            reason = f"decoding it takes longer than {LONGEST_S:g} s"
            return Unreadable(reason, "images that take too long to decode")

    def _tried(self, row: Row, most: int | None) -> T | Unreadable | _Large:
        try:
            image = open_image(row, self._reading)
            pixels = weighed_pixels(image)
            return self._work(image) if most is None or pixels <= most else _Large(pixels)
        except Exception as error:  # of many kinds, for the bytes can be anything
            return why_unreadable(row, error)

    def _renew(self) -> None:
        """Go on with other threads. Python cannot stop those that are busy."""
        self._pool = ThreadPool(self._threads)

    def close(self) -> None:
        """Let idle threads end."""
        self._pool.terminate()


@cache
def _geometry(config: str) -> list[Step]:
    """The geometric steps of open_clip's evaluation transform (resize, crop, RGB), from its
    `preprocess_cfg` as a JSON document.
    """
    # This import takes seconds, and images of the right size do not need it.
    import open_clip.transform as clip_transform

    settings = clip_transform.PreprocessCfg(**json.loads(config))
    transform = clip_transform.image_transform_v2(settings, is_train=False)
    return list(transform.transforms[:-2])  # without ToTensor and Normalize
