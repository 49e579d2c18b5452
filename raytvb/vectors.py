"""Vector files: what is on disk, read and combined in blocks so that memory is bounded by the block, never by T * D.

A vector file is a safetensors file of one dtype with tensors in the order of their sorted names, so its data section is
one flat array and a range of coordinates is a range of bytes. Its only metadata key, `raytvb`, is JSON without times,
URLs or machine names, so equal vectors are equal files. A sparse vector has per parameter the 1-D kept values and names
its mask file relative to itself. A mask file packs D parameters to D/8 bytes and counts the kept ones per 65,536
coordinates, so that it too can be read from the middle.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from raytvb.records import FileInfo
from raytvb.sparse import pack_bits, unpack_bits
from raytvb.store import Store
from raytvb.talos import flatten

BLOCK = 65536  # coordinates; divides evenly into bytes of a packed mask
FORMAT = 1
_DTYPES: dict[str, tuple[np.dtype[Any], int]] = {"F32": (np.dtype("<f4"), 4), "BF16": (np.dtype("<u2"), 2)}


class VectorError(ValueError):
    """A vector or mask file that cannot be used, or vectors that do not belong together; the message names them."""


@dataclass(frozen=True)
class Mask:
    """A selection of K out of D parameters: shapes by name, in sorted order, and a flat bool tensor `bits` (D,)."""

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
        digest = hashlib.sha256(json.dumps({n: list(s) for n, s in self.shapes.items()}, sort_keys=True).encode())
        digest.update(pack_bits(self.bits).numpy().tobytes())
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """The mask file: `bits` uint8 (ceil(D/8),), `block_counts` int64 kept entries per 65,536 coordinates."""
        counts = torch.stack([b.sum() for b in self.bits.split(BLOCK)])
        info = {"fingerprint": self.fingerprint, "format": FORMAT, "kept": self.kept,
                "shapes": {n: list(s) for n, s in self.shapes.items()}, "total": len(self.bits)}
        tensors = {"bits": pack_bits(self.bits), "block_counts": counts}
        return save(tensors, metadata={"raytvb": json.dumps(info, sort_keys=True)})


@dataclass(frozen=True)
class _Header:
    """A safetensors header: entries by name as {dtype, shape, data_offsets}, and where the data section starts."""

    entries: Mapping[str, Any]
    info: Mapping[str, Any]
    start: int

    @classmethod
    def read(cls, store: Store, key: str) -> _Header:
        where = store.where(key)
        try:
            length = struct.unpack("<Q", store.read_range(key, 0, 8))[0]
            size = store.size(key)
            if not 2 <= length <= size - 8:
                raise ValueError(f"its header claims {length} bytes of a file of {size}")
            raw = json.loads(store.read_range(key, 8, 8 + length))
            info = json.loads(raw.pop("__metadata__", {})["raytvb"])
            end = max((e["data_offsets"][1] for e in raw.values()), default=0)
            if 8 + length + end != size:
                raise ValueError(f"it has {size} bytes, its header describes {8 + length + end}")
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise VectorError(f"{where} is not a whole raytvb safetensors file: {error}") from None
        ordered = dict(sorted(raw.items(), key=lambda item: item[1]["data_offsets"][0]))
        return cls(ordered, info, 8 + length)


class MaskFile:
    """Random access to a stored mask by coordinate range."""

    def __init__(self, store: Store, key: str) -> None:
        """Reads the header and the block counts. Raises VectorError for a file that is not a whole mask."""
        self._store, self._key = store, key
        header = _Header.read(store, key)
        self.info = header.info
        self.total, self.kept = int(header.info["total"]), int(header.info["kept"])
        self.fingerprint = str(header.info["fingerprint"])
        self._bits = header.start + header.entries["bits"]["data_offsets"][0]
        first, last = (header.start + o for o in header.entries["block_counts"]["data_offsets"])
        counts = np.frombuffer(store.read_range(key, first, last), dtype="<i8")
        self._before = np.concatenate([[0], np.cumsum(counts)])

    def bits(self, start: int, stop: int) -> Tensor:
        """Bool (stop - start,) of a coordinate range; `start` must be a multiple of 8."""
        return unpack_bits(self.packed(start, stop), stop - start)

    def packed(self, start: int, stop: int) -> Tensor:
        """The same range as it is stored: uint8, eight coordinates a byte, the rest of the last byte zero."""
        data = self._store.read_range(self._key, self._bits + start // 8, self._bits + (stop + 7) // 8)
        return torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))

    def kept_before(self, start: int) -> int:
        """Number of kept entries in front of coordinate `start`."""
        whole = start // BLOCK
        rest = int(self.bits(whole * BLOCK, start).sum()) if start % BLOCK else 0
        return int(self._before[whole]) + rest

    def load(self) -> Mask:
        """The whole mask in memory, D bytes."""
        shapes = {n: tuple(s) for n, s in sorted(self.info["shapes"].items())}
        mask = Mask(shapes, self.bits(0, self.total))
        if mask.fingerprint != self.fingerprint:
            raise VectorError(f"{self._store.where(self._key)}: bits and fingerprint differ; the file is damaged")
        return mask


def mask_intersections(masks: Sequence[MaskFile]) -> Tensor:
    """Number of entries that each two masks both keep, (T, T) int64; its diagonal is what each keeps.

    Reads every file once, T * 128 kB at a time. Raises VectorError for masks over different numbers of parameters.
    """
    totals = {m.total for m in masks}
    if len(totals) > 1:
        raise VectorError(f"masks over different numbers of parameters: {sorted(totals)}")
    counts = torch.zeros(len(masks), len(masks), dtype=torch.int64)
    for start in range(0, masks[0].total, 16 * BLOCK):
        read = [m.packed(start, min(start + 16 * BLOCK, m.total)) for m in masks]
        for first in range(0, len(read[0]), BLOCK // 8):
            # Products of zeros and ones: float32 counts up to 2^24 exactly.
            bits = torch.stack([unpack_bits(r[first:first + BLOCK // 8], 8 * len(r[first:first + BLOCK // 8]))
                                for r in read]).float()
            counts += (bits @ bits.T).long()
    return counts


def vector_info(base: str, *, mask_path: str | None = None, mask: str | None = None) -> dict[str, Any]:
    """Metadata of a vector file: fingerprint of the base, and path and fingerprint of the mask where it is sparse."""
    info: dict[str, Any] = {"base": base, "format": FORMAT, "kind": "dense" if mask is None else "sparse"}
    return info if mask is None else info | {"mask": mask_path, "mask_fingerprint": mask}


def vector_bytes(values: Mapping[str, Tensor], info: Mapping[str, Any]) -> bytes:
    """A vector file: dense parameter tensors, or per parameter the 1-D kept values. One dtype, fp32 or bf16."""
    if len({t.dtype for t in values.values()}) != 1:
        raise ValueError("a vector file has one dtype")
    tensors = {n: t.detach().cpu().contiguous() for n, t in values.items()}
    return save(tensors, metadata={"raytvb": json.dumps(dict(info), sort_keys=True)})


def _header_bytes(entries: Mapping[str, Sequence[int]], info: Mapping[str, Any]) -> bytes:
    """Header of a float32 safetensors file whose data will be streamed behind it; byte for byte what `save` writes."""
    header: dict[str, Any] = {"__metadata__": {"raytvb": json.dumps(dict(info), sort_keys=True)}}
    offset = 0
    for name in sorted(entries):
        size = 4 * prod(entries[name])
        header[name] = {"dtype": "F32", "shape": list(entries[name]), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class VectorFile:
    """One vector in a store, read by ranges; opening it reads its header (and its mask's) only."""

    def __init__(self, store: Store, key: str) -> None:
        """Raises VectorError for a file that is truncated, of mixed dtype or not a vector file."""
        self.store, self.key = store, key
        header = _Header.read(store, key)
        self.info, self._start = header.info, header.start
        dtypes = {e["dtype"] for e in header.entries.values()}
        if len(dtypes) != 1 or not dtypes <= _DTYPES.keys():
            raise VectorError(f"{self.where}: dtypes {sorted(dtypes)}; a vector file has one, F32 or BF16")
        self._dtype, self._width = _DTYPES[dtypes.pop()]
        self.shapes = {n: tuple(e["shape"]) for n, e in header.entries.items()}
        if list(self.shapes) != sorted(self.shapes):
            raise VectorError(f"{self.where}: tensors are not in the order of their names")
        self.stored = sum(prod(s) for s in self.shapes.values())
        self.mask: MaskFile | None = None
        if self.info.get("kind") == "sparse":
            folder = posixpath.dirname(key)
            self.mask_key = posixpath.normpath(posixpath.join(folder, self.info["mask"]))
            self.mask = MaskFile(store, self.mask_key)
            if self.mask.fingerprint != self.info["mask_fingerprint"] or self.mask.kept != self.stored:
                raise VectorError(f"{self.where} was made with another mask than {store.where(self.mask_key)}")

    @classmethod
    def open(cls, url: str) -> VectorFile:
        """From a path or URL outside of any experiment. The store is rooted where the mask can be reached too."""
        folder, name = posixpath.split(url)
        folder = Store(folder or ".").url  # absolute, so that the levels below are all there
        levels: list[str] = []
        header = _Header.read(Store(folder), name)
        for _ in range(str(header.info.get("mask", "")).count("../")):
            folder, last = posixpath.split(folder)
            levels.insert(0, last)
        return cls(Store(folder), posixpath.join(*levels, name))

    @property
    def where(self) -> str:
        """The file's path, for messages."""
        return self.store.where(self.key)

    def values(self, start: int, stop: int) -> Tensor:
        """Stored values start..stop as float32."""
        first = self._start + start * self._width
        data = self.store.read_range(self.key, first, self._start + stop * self._width)
        array = np.frombuffer(data, dtype=self._dtype)
        if len(array) != stop - start:
            raise VectorError(f"{self.where} is truncated")
        if self._width == 2:  # bf16 is the upper half of a float32
            array = (array.astype("<u4") << 16).view("<f4")
        return torch.from_numpy(array.astype(np.float32, copy=True))


class VectorSet:
    """T vectors of one base on common coordinates: the stored values where all share a mask, else all D parameters."""

    def __init__(self, files: Sequence[VectorFile]) -> None:
        """Raises VectorError that names two vectors which do not belong together."""
        if not files:
            raise VectorError("no vectors given")
        self.files = list(files)
        first = files[0]
        self.compact = all(f.info.get("mask_fingerprint") == first.info.get("mask_fingerprint") for f in files)
        for file in files[1:]:
            if file.info["base"] != first.info["base"]:
                raise VectorError(f"{first.where} and {file.where} are differences from different pretrained models")
            if self.compact and file.shapes != first.shapes:
                raise VectorError(f"{first.where} and {file.where} have tensors of different names or shapes")
        self.parameters = self._parameters(first)
        for file in files[1:]:
            if self._parameters(file) != self.parameters:
                raise VectorError(f"{first.where} and {file.where} have parameters of different names or shapes")
        self.count = first.stored if self.compact else sum(prod(s) for s in self.parameters.values())

    @staticmethod
    def _parameters(file: VectorFile) -> dict[str, tuple[int, ...]]:
        if file.mask is None:
            return file.shapes
        return {n: tuple(s) for n, s in sorted(file.mask.info["shapes"].items())}

    def read(self, index: int, start: int, stop: int) -> Tensor:
        """Coordinates start..stop of vector `index` as float32; zero where its own mask keeps nothing."""
        file = self.files[index]
        if self.compact or file.mask is None:
            return file.values(start, stop)
        bits = file.mask.bits(start, stop)
        first = file.mask.kept_before(start)
        out = torch.zeros(stop - start)
        out[bits] = file.values(first, first + int(bits.sum()))
        return out

    def ranges(self, block: int = BLOCK) -> Iterator[tuple[int, int]]:
        """Consecutive coordinate ranges that cover everything."""
        if block < 8 or block % 8:
            raise ValueError(f"block must be a positive multiple of 8, not {block}")
        return ((a, min(a + block, self.count)) for a in range(0, self.count, block))

    def combine(self, weights: Tensor, block: int = BLOCK) -> Tensor:
        """sum_t weights[t] * v_t over the common coordinates, float32 (count,); weights (T,) float64."""
        out = torch.zeros(self.count)
        for index, weight in enumerate(weights.tolist()):
            if weight != 0.0:
                for start, stop in self.ranges(block):
                    out[start:stop].add_(self.read(index, start, stop), alpha=weight)
        return out

    def output_info(self, key: str) -> dict[str, Any]:
        """Metadata for a new vector on these coordinates that will be stored under `key` of the same store."""
        first = self.files[0]
        if not self.compact or first.mask is None:
            return vector_info(first.info["base"])
        path = posixpath.relpath(first.mask_key, posixpath.dirname(key))
        return vector_info(first.info["base"], mask_path=path, mask=first.mask.fingerprint)


def gram_row(vectors: VectorSet, index: int, others: Sequence[int], block: int = BLOCK) -> Tensor:
    """Inner products of vector `index` with the given ones, float64 (len(others),).

    Each pair is multiplied and summed by itself in float64 and on one thread, so an entry is the same bits whatever
    the order in which vectors arrive. Raises VectorError for NaN or infinite values.
    """
    row = np.zeros(len(others))
    for start, stop in vectors.ranges(block):
        left = vectors.read(index, start, stop).numpy().astype(np.float64)
        if not np.isfinite(left).all():
            raise VectorError(f"{vectors.files[index].where} has NaN or infinite values")
        for position, other in enumerate(others):
            right = left if other == index else vectors.read(other, start, stop).numpy()
            row[position] += np.multiply(left, right).sum()
    return torch.from_numpy(row)


def gram_matrix(paths: Sequence[str], *, block: int = BLOCK) -> Tensor:
    """G = V'V of vector files, (T, T) float64; paths are local or URLs. Memory: T * block float32 values.

    Products are float32 matrix products per block of coordinates, added up in float64. Raises VectorError for files
    that are damaged, do not belong together, or hold NaN or infinite values.
    """
    vectors = VectorSet([VectorFile.open(p) for p in paths])
    gram = torch.zeros(len(paths), len(paths), dtype=torch.float64)
    buffer = torch.empty(len(paths), min(block, max(vectors.count, 1)))
    for start, stop in vectors.ranges(block):
        rows = buffer[:, :stop - start]
        for index in range(len(paths)):
            rows[index] = vectors.read(index, start, stop)
        gram += (rows @ rows.T).double()
    for index in (~torch.isfinite(gram.diagonal())).nonzero()[:, 0].tolist():
        raise VectorError(f"{paths[index]} has NaN or infinite values")
    return (gram + gram.T) / 2


def write_combinations(vectors: VectorSet, outputs: Sequence[tuple[Tensor, Sequence[str]]], store: Store,
                       block: int = BLOCK) -> dict[str, FileInfo]:
    """Write V @ weights for each (weights (T, M) float64, M keys) in one pass over V; key -> checksum and size.

    Memory: (T + largest M) * block float32 values. Each product has a shape of its own, so the bits of one basis do not
    depend on which others are written in the same pass. The files are float32, on the coordinates of `vectors`.
    """
    shapes = vectors.files[0].shapes if vectors.compact else vectors.parameters
    products = [(weights.T.to(torch.float32).contiguous(), list(keys)) for weights, keys in outputs]
    keys = [key for _, group in products for key in group]
    digests = {key: hashlib.sha256() for key in keys}
    sizes = dict.fromkeys(keys, 0)
    with ExitStack() as stack:
        writers = {key: stack.enter_context(store.open_writer(key)) for key in keys}

        def put(key: str, data: bytes) -> None:
            writers[key].write(data)
            digests[key].update(data)
            sizes[key] += len(data)

        for key in keys:
            put(key, _header_bytes(shapes, vectors.output_info(key)))
        buffer = torch.empty(len(vectors.files), min(block, max(vectors.count, 1)))
        for start, stop in vectors.ranges(block):
            rows = buffer[:, :stop - start]
            for index in range(len(vectors.files)):
                rows[index] = vectors.read(index, start, stop)
            for factors, group in products:
                for key, row in zip(group, factors @ rows, strict=True):
                    put(key, row.numpy().tobytes())
    return {key: FileInfo(digests[key].hexdigest(), sizes[key]) for key in keys}
