"""A local copy of vectors on a range of coordinates, so that each is fetched once and multiplied
often.

Only what is stored is kept: float32 or bfloat16 values of the kept entries, and one bit a
coordinate where a vector has a mask of its own. That is T * density * (coordinates) * 4 bytes, in
memory or in an unnamed temporary file that vanishes with its process.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.maths.bits import unpack_bits
from raytvb.maths.gram import BLOCK
from raytvb.storage.records import PART, FileInfo
from raytvb.storage.store import Store
from raytvb.storage.vectors import VectorFile

_READERS = 8  # parts that are fetched at a time


@dataclass(frozen=True)
class _Entry:
    """A vector's values; for one with its own mask its bits and the kept entries before each
    BLOCK.
    """

    offset: int
    """In the temporary file."""
    dtype: torch.dtype
    packed: Tensor | None
    before: list[int]
    held: Tensor | None
    """The values as bytes, where they are in memory."""


class BlockCache:
    """Vectors by name on coordinates [start, stop); `start` is a multiple of BLOCK.

    own_masks: the coordinates are those of all parameters, and every vector brings its mask; else
    they are the stored values, which is the same for all.
    """

    def __init__(
        self, start: int, stop: int, *, own_masks: bool, folder: str | None = None
    ) -> None:
        """folder: where the temporary file is made; None keeps everything in memory."""
        self.start, self.stop = start, stop
        self.kind = "memory" if folder is None else "disk"
        self.bytes = 0
        self._own_masks = own_masks
        self._entries: dict[str, _Entry] = {}
        self._end = 0
        self._file: Any = None
        if folder is not None:
            self._file = tempfile.TemporaryFile(dir=folder, prefix="raytvb-", buffering=0)  # noqa: SIM115

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def add(self, name: str, vector: VectorFile, info: FileInfo) -> None:
        """Fetch a vector's part of the coordinates, checking every byte of it against the recorded
        checksums.

        Raises VectorError that names a file whose bytes differ; nothing of that one is kept.
        """
        packed, before = None, list[int]()
        first, last = self.start, self.stop
        if self._own_masks and vector.mask is not None:
            packed = vector.mask.packed(self.start, self.stop)
            counts = [
                vector.mask.kept_before(edge)
                for edge in (*range(self.start, self.stop, BLOCK), self.stop)
            ]
            first, last = counts[0], counts[-1]
            before = [count - first for count in counts]
            for part, (low, high) in zip(packed.split(BLOCK // 8), pairwise(before), strict=False):
                if int(unpack_bits(part, 8 * len(part)).sum()) != high - low:
                    raise damaged(vector.store, vector.mask_key)
        low, high = vector.byte_range(first, last)
        # torch's allocations begin at multiples of 64 bytes, numpy's do not: sums must not depend
        # on where.
        held = torch.empty(high - low, dtype=torch.uint8) if self._file is None else None
        entry = _Entry(self._end, vector.dtype, packed, before, held)
        for at, piece in _checked_parts(vector, info, low, high):
            self._put(entry, at - low, piece)
        self._entries[name] = entry
        self._end += high - low
        self.bytes += high - low + (0 if packed is None else len(packed))

    def drop(self, name: str) -> None:
        """Forget a vector; its room in a temporary file is not used again, and stays counted."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            self.bytes -= sum(len(t) for t in (entry.held, entry.packed) if t is not None)

    def _put(self, entry: _Entry, at: int, piece: memoryview) -> None:
        if entry.held is not None:
            entry.held.numpy().data[at : at + len(piece)] = piece
            return
        self._file.seek(entry.offset + at)
        while len(piece):
            piece = piece[self._file.write(piece) :]

    def _values(self, entry: _Entry, first: int, count: int) -> Tensor:
        """Stored values first..first + count of an entry, float32."""
        width = entry.dtype.itemsize
        if entry.held is not None:
            return entry.held[first * width : (first + count) * width].view(entry.dtype).float()
        raw = torch.empty(count, dtype=entry.dtype)
        self._file.seek(entry.offset + first * width)
        view, done = raw.view(torch.uint8).numpy().data, 0
        while done < len(view):
            read = self._file.readinto(view[done:])
            if not read:
                raise OSError(
                    "the temporary file of the vectors is shorter than it was: is its disk full?"
                )
            done += read
        return raw.float()

    def read(self, name: str, first: int, last: int) -> Tensor:
        """Coordinates first..last (absolute) of a vector, float32; `first` must be a multiple of 8.

        May be a view of the cache: it is not to be written to.
        """
        entry, at = self._entries[name], first - self.start
        if entry.packed is None:
            return self._values(entry, at, last - first)
        whole = at // BLOCK * BLOCK
        bits = unpack_bits(
            entry.packed[whole // 8 : (last - self.start + 7) // 8], last - self.start - whole
        )
        start = entry.before[at // BLOCK] + int(bits[: at - whole].sum())
        bits, out = bits[at - whole :], torch.zeros(last - first)
        out[bits] = self._values(entry, start, int(bits.sum()))
        return out


def _checked_parts(
    vector: VectorFile, info: FileInfo, low: int, high: int
) -> Iterator[tuple[int, memoryview]]:
    """Bytes low..high of a vector file as (position, bytes), each part compared with its recorded
    checksum.
    """
    # A file without checksums of its parts is one part, of any size.
    if low == high:
        return
    size = PART if info.parts else max(info.size, 1)
    digests = info.parts or (info.sha256,)
    numbers = range(low // size, -(-high // size))

    def fetch(number: int) -> bytes:
        return vector.store.read_range(
            vector.key, number * size, min((number + 1) * size, info.size)
        )

    with ThreadPoolExecutor(_READERS) as pool:
        for group in range(0, len(numbers), _READERS):  # no more than these are held
            chosen = numbers[group : group + _READERS]
            for number, data in zip(chosen, pool.map(fetch, chosen), strict=True):
                if hashlib.sha256(data).hexdigest() != digests[number]:
                    raise damaged(vector.store, vector.key)
                start = number * size
                view = memoryview(data)[max(0, low - start) : max(0, min(len(data), high - start))]
                if len(view):
                    yield max(low, start), view


def check_header(vector: VectorFile, info: FileInfo) -> None:
    """Compare the parts that have the vector's names and shapes with their checksums. Raises as
    `BlockCache.add`.
    """
    for _ in _checked_parts(vector, info, 0, vector.data_start):
        pass


def damaged(store: Store, key: str) -> VectorError:
    """The error for bytes that are not those that were recorded."""
    folder = key.rpartition("/")[0]
    return VectorError(
        f"{store.where(key)}: the bytes differ from those recorded; delete the folder {folder} of the "
        f"store and run again to make it anew"
    )
