"""Several vectors of one pretrained model as a matrix V (D, T), never in memory as a whole.

The matrix is read in blocks of coordinates, so the size of a block bounds the memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.maths.gram_blocks import BLOCK
from raytvb.storage.masks import MaskFile, OpenMasks
from raytvb.storage.store import Store
from raytvb.storage.vectors import VectorFile

BUFFER_BYTES = 64 * 2**20
"""Size of the values of a block. Two blocks are in memory: one is read while one is used."""

COMBINED_BYTES = 512 * 2**20
"""Size of the sums of vectors that are computed in one pass."""

_LOCAL_READERS, _REMOTE_READERS = 1, 16
"""Number of threads that fill a block. For a local store, a second thread that copies from the
disk's cache would only hold up the thread that multiplies."""


def block_columns(rows: int, budget: int = BUFFER_BYTES) -> int:
    """Number of coordinates in a block of `rows` float32 vectors.

    It is a multiple of BLOCK, or a power of two if one BLOCK exceeds the budget (bytes).
    """
    columns = budget // (4 * max(1, rows))
    return columns // BLOCK * BLOCK if columns >= BLOCK else max(8, 1 << (columns.bit_length() - 1))


class Coordinates(Protocol):
    """What vectors have in common: the parameters, and which of their entries are coordinates."""

    @property
    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by name."""

    @property
    def mask(self) -> MaskFile | None:
        """The mask whose kept entries are the coordinates; None where all entries are."""

    @property
    def count(self) -> int:
        """Number of coordinates."""

    def read_all(self, start: int, count: int) -> Tensor:
        """Coordinates start..start + count of every vector, float32 (F, count)."""

    def combinations(self, weights: Tensor) -> Iterator[Tensor]:
        """sum_f weights[f, k] * vector_f, float32 (count,), for each k in turn; weights (F, K)."""


class VectorSet:
    """T vectors of one pretrained model on common coordinates.

    The coordinates are the stored values if all vectors share a mask, else all D parameters.
    """

    def __init__(self, files: Sequence[VectorFile]) -> None:
        """Raises VectorError if there are no files, or if two do not belong together; it names
        these two.
        """
        if not files:
            raise VectorError("no vectors given")
        self.files = list(files)
        first = files[0]
        fingerprints = {file.info.mask_fingerprint for file in files}
        self.compact = len(fingerprints) == 1
        """Whether the coordinates are the stored values."""
        for file in files[1:]:
            check_pair(first, file, compact=self.compact)
        self.parameters = first.parameters
        self.mask = first.mask if self.compact else None
        self.count = first.stored if self.compact else sum(map(prod, self.parameters.values()))

    @classmethod
    def open(cls, store: Store, keys: Sequence[str]) -> VectorSet:
        """Open vector files of one store by their keys, several at a time if the store is remote.

        Reads the headers and the counts of the masks, but no values. Raises VectorError as
        `VectorFile` and the constructor.
        """
        masks = OpenMasks()

        def open_one(key: str) -> VectorFile:
            return VectorFile(store, key, masks)

        with ThreadPoolExecutor(readers(store)) as pool:
            return cls(list(pool.map(open_one, keys)))

    def subset(self, indices: Sequence[int]) -> VectorSet:
        """Some of the vectors, on the coordinates of all of them.

        If these vectors were opened alone they could have fewer coordinates: those of a mask that
        only they share.
        """
        chosen = copy.copy(self)
        chosen.files = [self.files[index] for index in indices]
        return chosen

    def read_into(self, index: int, start: int, out: Tensor) -> None:
        """Read coordinates from `start` on of vector `index` into `out` (n,) float32.

        Entries that the vector's own mask does not keep are zero. If vectors have their own masks,
        `start` must be a multiple of 8.
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
        """All coordinates as consecutive (start, rows (T, n) float32).

        The next block is read while one is used. The rows are a buffer that is used again, so they
        are valid only until the next block is taken. Memory: two blocks of T * columns float32
        values (64 MB each by default). Raises ValueError unless `columns` is a positive multiple
        of 8.
        """
        count = len(self.files)
        step = block_columns(count) if columns is None else columns
        if step < 8 or step % 8:
            raise ValueError(f"a block must be a positive multiple of 8, not {step}")
        starts = range(0, self.count, step)
        buffers = [torch.empty(count * min(step, self.count)) for _ in range(min(2, len(starts)))]

        def read(number: int) -> tuple[Tensor, list[Future[None]]]:
            width = min(step, self.count - starts[number])
            # The last block is narrower, and its rows too follow each other without gaps.
            rows = buffers[number % 2][: count * width].view(count, width)
            return rows, [
                pool.submit(self.read_into, i, starts[number], rows[i]) for i in range(count)
            ]

        with ThreadPoolExecutor(readers(self.files[0].store)) as pool:
            try:
                ahead = read(0) if starts else None
                for number, start in enumerate(starts):
                    assert ahead is not None
                    rows, reads = ahead
                    for vector in reads:
                        vector.result()
                    ahead = read(number + 1) if number + 1 < len(starts) else None
                    yield start, rows
            finally:
                pool.shutdown(cancel_futures=True)

    def combinations(self, weights: Tensor) -> Iterator[Tensor]:
        """sum_t weights[t, k] * v_t over the common coordinates, for each k in turn.

        weights: (T, K) float64. Each sum is float32 (count,). One pass over the vectors computes as
        many sums as fit in 512 MB. It does not read a vector whose weights in all of them are 0.
        """
        for part in weights.split(_together(self.count), dim=1):
            used = part.any(dim=1).nonzero()[:, 0].tolist()
            chosen = self.subset(used) if used else self
            yield from combinations(chosen.blocks, self.count, part[used] if used else part)


def readers(store: Store) -> int:
    """How many vector files of a store are read at a time."""
    return _LOCAL_READERS if store.is_local else _REMOTE_READERS


def _together(count: int) -> int:
    """Number of sums of `count` float32 values that are in memory at a time."""
    return max(1, COMBINED_BYTES // (4 * max(1, count)))


def combinations(
    blocks: Callable[[], Iterator[tuple[int, Tensor]]], count: int, weights: Tensor
) -> Iterator[Tensor]:
    """The columns of V @ weights, (count,) float32, one after the other.

    blocks: called for each pass over the vectors; yields (start, rows of V' (T, n) float32).
    weights: (T, K).
    """
    for part in weights.split(_together(count), dim=1):
        factors = part.T.to(torch.float32).contiguous()
        out = torch.zeros(factors.shape[0], count)
        if factors.any():
            for start, rows in blocks():
                out[:, start : start + rows.shape[1]] = factors @ rows
        yield from out


def check_pair(first: VectorFile, file: VectorFile, *, compact: bool) -> None:
    """Raise VectorError that names both vectors if they do not belong together.

    compact: whether the stored values are the common coordinates, so that the masks must be equal.
    """
    if file.info.base != first.info.base:
        raise VectorError(
            f"{first.where} and {file.where} are differences from different pretrained models"
        )
    if compact and file.info.mask_fingerprint != first.info.mask_fingerprint:
        raise VectorError(f"{first.where} and {file.where} have different masks")
    if compact and file.shapes != first.shapes:
        raise VectorError(
            f"{first.where} and {file.where} have tensors of different names or shapes"
        )
    if file.parameters != first.parameters:
        raise VectorError(
            f"{first.where} and {file.where} have parameters of different names or shapes"
        )
