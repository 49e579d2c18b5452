"""Mask files: which parameters a task trains, one bit each.

A mask file packs D bits, one for each parameter, into D/8 bytes. It also has the number of kept
parameters in each 65,536 coordinates, so that it can be read from the middle. A coordinate is a
position in all parameters laid end to end, names sorted.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from threading import Lock

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.maths.bits import pack_bits, unpack_bits
from raytvb.maths.gram_blocks import BLOCK
from raytvb.maths.mask_selection import flatten
from raytvb.storage.checked_file import CheckedFile
from raytvb.storage.contract import Contract
from raytvb.storage.format_version import FORMAT
from raytvb.storage.header import Header
from raytvb.storage.shapes import Shape, Size
from raytvb.storage.store import Store


class MaskInfo(Contract):
    """Metadata of a mask file."""

    fingerprint: str
    """The fingerprint of the mask, see `Mask.fingerprint`."""
    kept: Size
    """Number of kept parameters K."""
    shapes: dict[str, Shape]
    """Shapes of the parameters by name."""
    total: Size
    """Number of parameters D."""
    format: int = FORMAT


@dataclass(frozen=True)
class Mask:
    """A selection of K out of D parameters."""

    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the parameters, names sorted."""
    bits: Tensor
    """Bool (D,): whether each coordinate is kept."""

    @classmethod
    def of(cls, mask: Mapping[str, Tensor]) -> Mask:
        """The mask that one bool tensor for each parameter describes."""
        return cls({n: tuple(mask[n].shape) for n in sorted(mask)}, flatten(mask))

    @property
    def kept(self) -> int:
        """Number of kept parameters K."""
        return int(self.bits.sum())

    def tensors(self) -> dict[str, Tensor]:
        """One bool tensor for each parameter, of its shape."""
        parts = self.bits.split([prod(s) for s in self.shapes.values()])
        return {n: p.view(s) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over names, shapes and bits."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode())
        digest.update(pack_bits(self.bits).numpy().tobytes())
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """The mask file: `bits` uint8 (ceil(D/8),), and `block_counts` int64 (ceil(D/65536),).

        A block count is the number of kept entries in 65,536 coordinates.
        """
        counts = torch.stack([block.sum() for block in self.bits.split(BLOCK)])
        info = MaskInfo(
            fingerprint=self.fingerprint,
            kept=self.kept,
            shapes=dict(self.shapes),
            total=len(self.bits),
        )
        tensors = {"bits": pack_bits(self.bits), "block_counts": counts}
        return save(tensors, metadata={"raytvb": json.dumps(info.to_json(), sort_keys=True)})


class MaskFile:
    """Random access to a stored mask by coordinate range.

    If the mask's folder has a record, all bits that are read are compared with it.
    """

    def __init__(self, store: Store, key: str) -> None:
        """Reads the header and the block counts.

        Raises VectorError for a file that is not a whole mask file, or is of a newer raytvb.
        """
        header = Header.read(CheckedFile.find(store, key))
        self._header, self._file = header, header.file
        info = header.info_as(MaskInfo, "mask file")
        self.shapes = {name: info.shapes[name] for name in sorted(info.shapes)}
        self.total, self.kept, self.fingerprint = info.total, info.kept, info.fingerprint
        _check_layout(header, info)
        self._bits = header.start + header.entries["bits"].begin
        counts = np.frombuffer(header.tensor_bytes("block_counts"), dtype="<i8")
        self._before = np.concatenate([[0], np.cumsum(counts)])
        # Sums of counts that lie may overflow, so every count is looked at.
        if ((counts < 0) | (counts > BLOCK)).any() or self._before[-1] != self.kept:
            raise VectorError(
                f"{store.where(key)}: counts and number of kept entries differ; the file is damaged"
            )

    def bits(self, start: int, stop: int) -> Tensor:
        """Bool (stop - start,) of a coordinate range; `start` must be a multiple of 8."""
        return unpack_bits(self.packed(start, stop), stop - start)

    def packed(self, start: int, stop: int) -> Tensor:
        """The bits of the same range as they are stored: uint8, eight coordinates in a byte.

        Bits of the last byte beyond the last coordinate of the mask are zero.
        """
        self._header.check("block_counts")
        data = self._file.read_range(self._bits + start // 8, self._bits + (stop + 7) // 8)
        return torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))

    def kept_before(self, start: int) -> int:
        """Number of kept entries before coordinate `start`."""
        if start == self.total:
            return self.kept
        whole = start // BLOCK
        rest = int(self.bits(whole * BLOCK, start).sum()) if start % BLOCK else 0
        return int(self._before[whole]) + rest

    def load(self) -> Mask:
        """The whole mask in memory, D bytes. Raises VectorError if the bits are damaged."""
        mask = Mask(self.shapes, self.bits(0, self.total))
        if mask.fingerprint != self.fingerprint:
            raise VectorError(
                f"{self._file.where}: bits and fingerprint differ; the file is damaged"
            )
        return mask


def _check_layout(header: Header, info: MaskInfo) -> None:
    """Raise VectorError unless a mask file has the tensors that its metadata describe."""
    where = header.file.where
    if sum(map(prod, info.shapes.values())) != info.total:
        raise VectorError(f"{where}: shapes and number of parameters differ; the file is damaged")
    for name, dtype, width, length in (
        ("bits", "U8", 1, -(-info.total // 8)),
        ("block_counts", "I64", 8, -(-info.total // BLOCK)),
    ):
        entry = header.entries.get(name)
        if entry is None:
            raise VectorError(f"{where} is not a mask file: it has no {name}")
        layout = entry.dtype, entry.shape, entry.end - entry.begin
        if layout != (dtype, (length,), width * length):
            raise VectorError(
                f"{where}: {name} is {entry.dtype} of shape {entry.shape} instead of {dtype} of "
                f"shape {(length,)}; the file is damaged"
            )


class OpenMasks:
    """Masks that are open already, so that vectors with the same mask read its header once.

    Several threads may use one object.
    """

    def __init__(self) -> None:
        self._masks: dict[str, MaskFile] = {}
        self._locks: defaultdict[str, Lock] = defaultdict(Lock)

    def open(self, store: Store, key: str, fingerprint: str) -> MaskFile:
        """The mask under `key`. It is read again if the open mask has another fingerprint."""
        where = store.where(key)
        with self._locks[where]:
            mask = self._masks.get(where)
            if mask is None or mask.fingerprint != fingerprint:
                mask = self._masks[where] = MaskFile(store, key)
            return mask


def mask_intersections(masks: Sequence[MaskFile]) -> Tensor:
    """Number of entries that two masks both keep, for all pairs of masks: (T, T) int64.

    The diagonal has the number of entries that each mask keeps. Reads every file once, T * 128 kB
    at a time. Raises VectorError for masks over different numbers of parameters.
    """
    totals = {m.total for m in masks}
    if len(totals) > 1:
        raise VectorError(f"masks over different numbers of parameters: {sorted(totals)}")
    counts = torch.zeros(len(masks), len(masks), dtype=torch.int64)
    for start in range(0, masks[0].total, 16 * BLOCK):
        stop = min(start + 16 * BLOCK, masks[0].total)
        packed = torch.stack([mask.packed(start, stop) for mask in masks])
        for part in packed.split(BLOCK // 8, dim=1):
            rows = [unpack_bits(row, 8 * len(row)) for row in part]
            # Products of zeros and ones: float32 counts up to 2^24 exactly.
            bits = torch.stack(rows).float()
            counts += (bits @ bits.T).long()
    return counts
