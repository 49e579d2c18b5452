"""A local copy of vectors on a range of coordinates. A vector is fetched once and multiplied often.

The copy holds only what is stored: float32 or bfloat16 values of the kept entries, and one bit for
each coordinate where a vector has its own mask. The values take T * density * (coordinates) * 4
bytes in float32, in memory or in an unnamed temporary file that vanishes with its process.
"""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from typing import IO

import torch
from torch import Tensor

from raytvb.maths.bits import unpack_bits
from raytvb.maths.gram_blocks import BLOCK
from raytvb.storage.checked_file import CheckedFile
from raytvb.storage.damage import differs
from raytvb.storage.masks import MaskFile
from raytvb.storage.records import FileInfo
from raytvb.storage.vectors import VectorFile

_READERS = 8
"""Number of parts that are fetched at a time."""


@dataclass(frozen=True)
class _Entry:
    """One vector in the cache."""

    offset: int
    """Where the vector's values begin in the temporary file, in bytes."""
    dtype: torch.dtype
    packed: Tensor | None
    """The bits of the vector's own mask, uint8; None where the coordinates are the stored values.
    """
    before: list[int]
    """Number of kept entries before each BLOCK of the coordinates; empty without an own mask."""
    held: Tensor | None
    """The values as bytes, uint8; None where they are in the temporary file."""


class BlockCache:
    """Vectors by name on coordinates [start, stop); `start` is a multiple of BLOCK."""

    def __init__(
        self, start: int, stop: int, *, own_masks: bool, folder: str | None = None
    ) -> None:
        """own_masks: whether the coordinates are those of all parameters, and vectors may have
        their own masks. If not, the coordinates are the stored values.

        folder: where the temporary file is created; None keeps everything in memory.
        """
        self.start, self.stop = start, stop
        self.kind = "memory" if folder is None else "disk"
        self.bytes = 0
        """Size of all values and bits."""
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

        info: the recorded checksums, with which every byte of the part is compared. Raises
        DamagedError that names a file whose bytes differ, and then keeps nothing of the vector.
        """
        packed: Tensor | None = None
        counts = [self.start, self.stop]
        if self._own_masks and vector.mask is not None:
            packed, counts = self._own_mask(vector, vector.mask)
        before = [count - counts[0] for count in counts] if packed is not None else []
        low, high = vector.byte_range(counts[0], counts[-1])
        # Sums must not depend on the address of the values. Allocations by torch begin at multiples
        # of 64 bytes, those by numpy do not.
        held = torch.empty(high - low, dtype=torch.uint8) if self._file is None else None
        entry = _Entry(self._end, vector.dtype, packed, before, held)
        file = CheckedFile(vector.store, vector.key, info)
        for at, piece in file.parts(low, high, _READERS):
            self._put(entry, at - low, piece)
        self._entries[name] = entry
        self._end += high - low
        self.bytes += high - low + (0 if packed is None else len(packed))

    def _own_mask(self, vector: VectorFile, mask: MaskFile) -> tuple[Tensor, list[int]]:
        """The bits of a vector's mask in this range, and numbers of kept entries before each BLOCK
        and before the end of the range.

        The numbers count from the vector's first coordinate. Raises DamagedError unless the bits
        agree with these numbers.
        """
        packed = mask.packed(self.start, self.stop)
        edges = (*range(self.start, self.stop, BLOCK), self.stop)
        counts = [mask.kept_before(edge) for edge in edges]
        for part, (low, high) in zip(packed.split(BLOCK // 8), pairwise(counts), strict=False):
            if int(unpack_bits(part, 8 * len(part)).sum()) != high - low:
                where = vector.store.where(vector.mask_key)
                raise differs(where, vector.store.url, "its bits and its counts differ")
        return packed, counts

    def drop(self, name: str) -> None:
        """Forget a vector. Its space in a temporary file is not reused, and stays in `bytes`."""
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
        """Fill the buffer with bytes of the temporary file from `offset` on."""
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

        Coordinates count from the start of the vector, not of the cache. Do not write to the
        result: it may be a view of the cache.
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
