"""Several vectors of one base, read in blocks so that memory is bounded by the block, never by T *
D.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.maths.gram import BLOCK
from raytvb.storage.masks import MaskFile
from raytvb.storage.vectors import VectorFile

BUFFER_BYTES = (
    64 * 2**20
)  # of the values of a block; two are held, one read while the other is used


COMBINED_BYTES = 512 * 2**20  # of the sums of vectors that are made in one pass


# Threads that fill a block: local store, remote one. More than one that copies from the disk's
# cache would only take the interpreter from the thread that multiplies.
_READERS = {True: 1, False: 16}


def block_columns(rows: int, budget: int = BUFFER_BYTES) -> int:
    """Coordinates of a block of `rows` float32 vectors: whole BLOCKs, or where one is too much a
    power of two.
    """
    columns = budget // (4 * max(1, rows))
    return columns // BLOCK * BLOCK if columns >= BLOCK else max(8, 1 << (columns.bit_length() - 1))


class Coordinates(Protocol):
    """What vectors have in common: parameters by name, and which of their entries are
    coordinates.
    """

    @property
    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by name."""

    @property
    def mask(self) -> MaskFile | None:
        """The mask whose kept entries are the coordinates; None where every entry is one."""

    @property
    def count(self) -> int:
        """Number of coordinates."""

    def read_all(self, start: int, count: int) -> Tensor:
        """Coordinates start..start + count of every vector, float32 (F, count)."""

    def combinations(self, weights: Tensor) -> Iterator[Tensor]:
        """sum_f weights[f, k] * vector_f, float32 (count,), for each k in turn; weights (F, K)."""


class VectorSet:
    """T vectors of one base on common coordinates: the stored values where all share a mask, else
    all D parameters.
    """

    def __init__(self, files: Sequence[VectorFile]) -> None:
        """Raises VectorError that names two vectors which do not belong together."""
        if not files:
            raise VectorError("no vectors given")
        self.files = list(files)
        first = files[0]
        self.compact = all(
            f.info.get("mask_fingerprint") == first.info.get("mask_fingerprint") for f in files
        )
        for file in files[1:]:
            check_pair(first, file, compact=self.compact)
        self.parameters = first.parameters
        self.mask = first.mask if self.compact else None
        self.count = (
            first.stored if self.compact else sum(prod(s) for s in self.parameters.values())
        )

    def read_into(self, index: int, start: int, out: Tensor) -> None:
        """Coordinates from `start` of vector `index` into `out`; zero where its own mask keeps
        nothing.
        """
        file = self.files[index]
        if self.compact or file.mask is None:
            file.read_into(start, out)
            return
        bits = file.mask.bits(start, start + len(out))
        first = file.mask.kept_before(start)
        out.zero_()
        out[bits] = file.values(first, first + int(bits.sum()))

    def read_all(self, start: int, count: int) -> Tensor:
        """Coordinates start..start + count of every vector, float32 (T, count)."""
        before = start % 8  # masks are read by bytes
        out = torch.empty(len(self.files), before + count)
        for index, row in enumerate(out):
            self.read_into(index, start - before, row)
        return out[:, before:]

    def blocks(self, columns: int | None = None) -> Generator[tuple[int, Tensor], None, None]:
        """All coordinates as consecutive (start, rows (T, n) float32): the next block is read while
        one is used.

        The rows are a buffer that is written again: they are good until the next is asked for.
        Memory: two blocks of T * columns float32 values (64 MB each by default).
        """
        count = len(self.files)
        step = block_columns(count) if columns is None else columns
        if step < 8 or step % 8:
            raise ValueError(f"a block must be a positive multiple of 8, not {step}")
        starts = range(0, self.count, step)
        buffers = [torch.empty(count * min(step, self.count)) for _ in range(min(2, len(starts)))]
        local = self.files[0].store.local_path(self.files[0].key) is not None

        def read(number: int) -> tuple[Tensor, list[Future[None]]]:
            width = min(step, self.count - starts[number])
            # The last block is narrower: its rows still follow each other without gaps.
            rows = buffers[number % 2][: count * width].view(count, width)
            return rows, [
                pool.submit(self.read_into, i, starts[number], rows[i]) for i in range(count)
            ]

        with ThreadPoolExecutor(_READERS[local]) as pool:
            try:
                ahead = read(0) if starts else None
                for number, start in enumerate(starts):
                    assert ahead is not None
                    rows, reads = ahead
                    for each in reads:
                        each.result()
                    ahead = read(number + 1) if number + 1 < len(starts) else None
                    yield start, rows
            finally:
                pool.shutdown(cancel_futures=True)

    def combinations(self, weights: Tensor) -> Iterator[Tensor]:
        """sum_t weights[t, k] * v_t over the common coordinates, for each k in turn; weights (T, K)
        float64.

        Each is float32 (count,). As many as fit in 512 MB are made in one pass over the vectors; a
        vector that none of them has weight for is not read.
        """
        for part in weights.split(_together(self.count), dim=1):
            used = part.any(dim=1).nonzero()[:, 0].tolist()
            chosen = VectorSet([self.files[i] for i in used]) if used else self
            # Some of the vectors may have less in common than all of them.
            chosen.compact, chosen.mask, chosen.count = self.compact, self.mask, self.count
            yield from combinations(chosen.blocks, self.count, part[used] if used else part)


def _together(count: int) -> int:
    """Directions of `count` float32 values that are held at a time."""
    return max(1, COMBINED_BYTES // (4 * max(1, count)))


def combinations(
    blocks: Callable[[], Iterator[tuple[int, Tensor]]], count: int, weights: Tensor
) -> Iterator[Tensor]:
    """Columns of V @ weights (count,) float32 one after the other; `blocks` gives (start, rows of
    V' (T, n)) anew.
    """
    for part in weights.split(_together(count), dim=1):
        factors = part.T.to(torch.float32).contiguous()
        out = torch.zeros(factors.shape[0], count)
        if factors.any():
            for start, rows in blocks():
                out[:, start : start + rows.shape[1]] = factors @ rows
        yield from out


def check_pair(first: VectorFile, file: VectorFile, *, compact: bool) -> None:
    """Raise VectorError that names both where two vectors do not belong together.

    compact: the stored values are to be the common coordinates, so the masks must be the same.
    """
    if file.info["base"] != first.info["base"]:
        raise VectorError(
            f"{first.where} and {file.where} are differences from different pretrained models"
        )
    if compact and file.info.get("mask_fingerprint") != first.info.get("mask_fingerprint"):
        raise VectorError(f"{first.where} and {file.where} have different masks")
    if compact and file.shapes != first.shapes:
        raise VectorError(
            f"{first.where} and {file.where} have tensors of different names or shapes"
        )
    if file.parameters != first.parameters:
        raise VectorError(
            f"{first.where} and {file.where} have parameters of different names or shapes"
        )
