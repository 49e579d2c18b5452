"""A local copy of vectors on a range of coordinates: each is fetched once and multiplied often.

Only what is stored is kept: float32 or bfloat16 values of the kept entries, and one bit a
coordinate where a vector has a mask of its own. That is T * density * (coordinates) * 4 bytes, in
memory or in an unnamed temporary file that vanishes with its process.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import IO

import torch
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.maths.bits import unpack_bits
from raytvb.maths.gram_blocks import BLOCK
from raytvb.storage.masks import MaskFile
from raytvb.storage.records import PART, FileInfo
from raytvb.storage.store import Store
from raytvb.storage.vectors import VectorFile

_READERS = 8
"""Parts that are fetched at a time."""


@dataclass(frozen=True)
class _Entry:
    """One vector in the cache."""

    offset: int
    """Where its values begin in the temporary file, in bytes."""
    dtype: torch.dtype
    packed: Tensor | None
    """The bits of its own mask, uint8; None where the coordinates are the stored values."""
    before: list[int]
    """Kept entries before each BLOCK of the coordinates, where it has its own mask."""
    held: Tensor | None
    """The values as bytes, where they are in memory."""


class BlockCache:
    """Vectors by name on coordinates [start, stop); `start` is a multiple of BLOCK."""

    def __init__(
        self, start: int, stop: int, *, own_masks: bool, folder: str | None = None
    ) -> None:
        """own_masks: the coordinates are those of all parameters, and every vector has its mask.

        Else the coordinates are the stored values. folder: where the temporary file is made; None
        keeps everything in memory.
        """
        self.start, self.stop = start, stop
        self.kind = "memory" if folder is None else "disk"
        self.bytes = 0
        """Of all values and bits."""
        self._own_masks = own_masks
        self._entries: dict[str, _Entry] = {}
        self._end = 0
        self._file: IO[bytes] | None = None
        if folder is not None:
            self._file = tempfile.TemporaryFile(dir=folder, prefix="raytvb-", buffering=0)  # noqa: SIM115

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def add(self, name: str, vector: VectorFile, info: FileInfo) -> None:
        """Fetch a vector's part of the coordinates.

        info: as recorded; every byte of the part is compared with its checksums. Raises VectorError
        that names a file whose bytes differ; nothing of that one is kept.
        """
        packed: Tensor | None = None
        counts = [self.start, self.stop]
        if self._own_masks and vector.mask is not None:
            packed, counts = self._own_mask(vector, vector.mask)
        before = [count - counts[0] for count in counts] if packed is not None else []
        low, high = vector.byte_range(counts[0], counts[-1])
        # torch's allocations begin at multiples of 64 bytes, numpy's do not: sums must not depend
        # on where.
        held = torch.empty(high - low, dtype=torch.uint8) if self._file is None else None
        entry = _Entry(self._end, vector.dtype, packed, before, held)
        for at, piece in _checked_parts(vector, info, low, high):
            self._put(entry, at - low, piece)
        self._entries[name] = entry
        self._end += high - low
        self.bytes += high - low + (0 if packed is None else len(packed))

    def _own_mask(self, vector: VectorFile, mask: MaskFile) -> tuple[Tensor, list[int]]:
        """The bits of a vector's mask here, and the kept entries before each BLOCK and the end.

        The latter count from the first coordinate of the vector. Raises VectorError unless the bits
        have as many kept entries.
        """
        packed = mask.packed(self.start, self.stop)
        edges = (*range(self.start, self.stop, BLOCK), self.stop)
        counts = [mask.kept_before(edge) for edge in edges]
        for part, (low, high) in zip(packed.split(BLOCK // 8), pairwise(counts), strict=False):
            if int(unpack_bits(part, 8 * len(part)).sum()) != high - low:
                raise damaged(vector.store, vector.mask_key)
        return packed, counts

    def drop(self, name: str) -> None:
        """Forget a vector. Its room in a temporary file is not used again, and stays counted."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            for tensor in (entry.held, entry.packed):
                self.bytes -= 0 if tensor is None else len(tensor)

    def _put(self, entry: _Entry, at: int, piece: memoryview) -> None:
        if entry.held is not None:
            entry.held.numpy().data[at : at + len(piece)] = piece
            return
        assert self._file is not None
        self._file.seek(entry.offset + at)
        while len(piece):
            piece = piece[self._file.write(piece) :]

    def _values(self, entry: _Entry, first: int, count: int) -> Tensor:
        """Stored values first..first + count of an entry, float32."""
        width = entry.dtype.itemsize
        if entry.held is not None:
            return entry.held[first * width : (first + count) * width].view(entry.dtype).float()
        raw = torch.empty(count, dtype=entry.dtype)
        self._read_into(entry.offset + first * width, raw.view(torch.uint8).numpy().data)
        return raw.float()

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        """Bytes of the temporary file."""
        assert isinstance(self._file, io.RawIOBase)
        self._file.seek(offset)
        done = 0
        while done < len(buffer):
            count = self._file.readinto(buffer[done:])
            if not count:
                raise OSError(
                    "the temporary file of the vectors is shorter than it was: is its disk full?"
                )
            done += count

    def read(self, name: str, first: int, last: int) -> Tensor:
        """Coordinates first..last of a vector, float32; `first` must be a multiple of 8.

        They count from the start of the vector, not of the cache. The result may be a view of the
        cache: it is not to be written to.
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
    """Bytes low..high of a vector file as (position, bytes).

    Each part is compared with its recorded checksum.
    """
    if low == high:
        return
    # A file without checksums of its parts is one part, of any size.
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
    """Compare the parts that have the vector's names and shapes with their checksums.

    Raises as `BlockCache.add`.
    """
    for _ in _checked_parts(vector, info, 0, vector.data_start):
        pass


def damaged(store: Store, key: str) -> VectorError:
    """The error for bytes that are not those that were recorded."""
    folder = key.rpartition("/")[0]
    return VectorError(
        f"{store.where(key)}: the bytes differ from those recorded",
        f"delete the folder {folder} of the store and run again to make it anew",
    )
