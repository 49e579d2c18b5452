"""Mask files: which parameters a task trains, one bit each, and the safetensors header that all our
files share.

A mask file packs D parameters to D/8 bytes and counts the kept ones per 65,536 coordinates, so that
it can be read from the middle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.maths.bits import pack_bits, unpack_bits
from raytvb.maths.gram import BLOCK
from raytvb.maths.mask_selection import flatten
from raytvb.storage.header import FORMAT, Header
from raytvb.storage.store import Store


@dataclass(frozen=True)
class Mask:
    """A selection of K out of D parameters: shapes by name, in sorted order, and a flat bool tensor
    `bits` (D,).
    """

    shapes: Mapping[str, tuple[int, ...]]
    bits: Tensor

    @classmethod
    def of(cls, mask: Mapping[str, Tensor]) -> Mask:
        """From one bool tensor a parameter."""
        return cls({n: tuple(mask[n].shape) for n in sorted(mask)}, flatten(mask))

    @property
    def kept(self) -> int:
        """Number of kept parameters K."""
        return int(self.bits.sum())

    def tensors(self) -> dict[str, Tensor]:
        """One bool tensor a parameter."""
        parts = self.bits.split([prod(s) for s in self.shapes.values()])
        return {n: p.view(s) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over names, shapes and bits."""
        digest = hashlib.sha256(
            json.dumps({n: list(s) for n, s in self.shapes.items()}, sort_keys=True).encode()
        )
        digest.update(pack_bits(self.bits).numpy().tobytes())
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """The mask file: `bits` uint8 (ceil(D/8),), `block_counts` int64 kept entries per 65,536
        coordinates.
        """
        counts = torch.stack([b.sum() for b in self.bits.split(BLOCK)])
        info = {
            "fingerprint": self.fingerprint,
            "format": FORMAT,
            "kept": self.kept,
            "shapes": {n: list(s) for n, s in self.shapes.items()},
            "total": len(self.bits),
        }
        tensors = {"bits": pack_bits(self.bits), "block_counts": counts}
        return save(tensors, metadata={"raytvb": json.dumps(info, sort_keys=True)})


class MaskFile:
    """Random access to a stored mask by coordinate range."""

    def __init__(self, store: Store, key: str) -> None:
        """Reads the header and the block counts. Raises VectorError for a file that is not a whole
        mask.
        """
        self._store, self._key = store, key
        header = Header.read(store, key)
        self.info = header.info
        try:
            self.total, self.kept = int(header.info["total"]), int(header.info["kept"])
            self.fingerprint = str(header.info["fingerprint"])
            self._bits = header.start + header.entries["bits"]["data_offsets"][0]
            first, last = (header.start + o for o in header.entries["block_counts"]["data_offsets"])
        except KeyError as error:
            raise VectorError(f"{store.where(key)} is no mask file: it has no {error}") from None
        counts = np.frombuffer(store.read_range(key, first, last), dtype="<i8")
        self._before = np.concatenate([[0], np.cumsum(counts)])
        if len(counts) != -(-self.total // BLOCK) or self._before[-1] != self.kept:
            raise VectorError(
                f"{store.where(key)}: counts and number of kept entries differ; the file is damaged"
            )

    def bits(self, start: int, stop: int) -> Tensor:
        """Bool (stop - start,) of a coordinate range; `start` must be a multiple of 8."""
        return unpack_bits(self.packed(start, stop), stop - start)

    def packed(self, start: int, stop: int) -> Tensor:
        """The same range as it is stored: uint8, eight coordinates a byte, the rest of the last
        byte zero.
        """
        data = self._store.read_range(
            self._key, self._bits + start // 8, self._bits + (stop + 7) // 8
        )
        return torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))

    def kept_before(self, start: int) -> int:
        """Number of kept entries in front of coordinate `start`."""
        if start == self.total:
            return self.kept
        whole = start // BLOCK
        rest = int(self.bits(whole * BLOCK, start).sum()) if start % BLOCK else 0
        return int(self._before[whole]) + rest

    def load(self) -> Mask:
        """The whole mask in memory, D bytes."""
        shapes = {n: tuple(s) for n, s in sorted(self.info["shapes"].items())}
        mask = Mask(shapes, self.bits(0, self.total))
        if mask.fingerprint != self.fingerprint:
            raise VectorError(
                f"{self._store.where(self._key)}: bits and fingerprint differ; the file is damaged"
            )
        return mask


def mask_intersections(masks: Sequence[MaskFile]) -> Tensor:
    """Number of entries that each two masks both keep, (T, T) int64; its diagonal is what each
    keeps.

    Reads every file once, T * 128 kB at a time. Raises VectorError for masks over different numbers
    of parameters.
    """
    totals = {m.total for m in masks}
    if len(totals) > 1:
        raise VectorError(f"masks over different numbers of parameters: {sorted(totals)}")
    counts = torch.zeros(len(masks), len(masks), dtype=torch.int64)
    for start in range(0, masks[0].total, 16 * BLOCK):
        read = [m.packed(start, min(start + 16 * BLOCK, m.total)) for m in masks]
        for first in range(0, len(read[0]), BLOCK // 8):
            # Products of zeros and ones: float32 counts up to 2^24 exactly.
            bits = torch.stack(
                [
                    unpack_bits(
                        r[first : first + BLOCK // 8], 8 * len(r[first : first + BLOCK // 8])
                    )
                    for r in read
                ]
            ).float()
            counts += (bits @ bits.T).long()
    return counts
