"""Vector files: what is on disk, and reading it in blocks so that memory is bounded by the block, never by T * D.

A vector file is a safetensors file of one dtype with tensors in the order of their sorted names, so its data section is
one flat array and a range of coordinates is a range of bytes. Its only metadata key, `raytvb`, is JSON without times,
URLs or machine names, so equal vectors are equal files. A sparse vector has per parameter the 1-D kept values and names
its mask file relative to itself.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.masks import BLOCK, FORMAT, Header, MaskFile
from raytvb.store import Store

BUFFER_BYTES = 64 * 2**20  # of the values of a block; two are held, one read while the other is used
COMBINED_BYTES = 512 * 2**20  # of the sums of vectors that are made in one pass
# Threads that fill a block: local store, remote one. More than one that copies from the disk's cache would only take
# the interpreter from the thread that multiplies.
_READERS = {True: 1, False: 16}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def vector_info(base: str, *, mask_path: str | None = None, mask: str | None = None) -> dict[str, Any]:
    """Metadata of a vector file: fingerprint of the base, and path and fingerprint of the mask where it is sparse."""
    info: dict[str, Any] = {"base": base, "format": FORMAT, "kind": "dense" if mask is None else "sparse"}
    return info if mask is None else info | {"mask": mask_path, "mask_fingerprint": mask}


def vector_bytes(values: Mapping[str, Tensor], info: Mapping[str, Any]) -> bytes:
    """A vector file: dense parameter tensors, or per parameter the 1-D kept values. One dtype, fp32 or bf16."""
    dtypes = {t.dtype for t in values.values()}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        raise ValueError(f"a vector file has one dtype, float32 or bfloat16, not {', '.join(map(str, dtypes))}")
    tensors = {n: t.detach().cpu().contiguous() for n, t in values.items()}
    return save(tensors, metadata={"raytvb": json.dumps(dict(info), sort_keys=True)})


def block_columns(rows: int, budget: int = BUFFER_BYTES) -> int:
    """Coordinates of a block of `rows` float32 vectors: whole BLOCKs, or where one is too much a power of two."""
    columns = budget // (4 * max(1, rows))
    return columns // BLOCK * BLOCK if columns >= BLOCK else max(8, 1 << (columns.bit_length() - 1))


class Coordinates(Protocol):
    """What vectors have in common: parameters by name, and which of their entries are coordinates."""

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


class VectorFile:
    """One vector in a store, read by ranges; opening it reads its header (and its mask's) only."""

    def __init__(self, store: Store, key: str) -> None:
        """Raises VectorError for a file that is truncated, of mixed dtype or not a vector file."""
        self.store, self.key = store, key
        header = Header.read(store, key)
        self.info, self.data_start = header.info, header.start
        sparse = self.info.get("kind") == "sparse"
        missing = {"base", *(("mask", "mask_fingerprint") if sparse else ())} - self.info.keys()
        if missing:
            raise VectorError(f"{self.where} is no vector file: its metadata has no {', '.join(sorted(missing))}")
        dtypes = {e["dtype"] for e in header.entries.values()}
        if len(dtypes) != 1 or not dtypes <= _DTYPES.keys():
            raise VectorError(f"{self.where}: dtypes {sorted(dtypes)}; a vector file has one, F32 or BF16")
        self.dtype = _DTYPES[dtypes.pop()]
        self.shapes = {n: tuple(e["shape"]) for n, e in header.entries.items()}
        if list(self.shapes) != sorted(self.shapes):
            raise VectorError(f"{self.where}: tensors are not in the order of their names")
        self.stored = 0
        for name, entry in header.entries.items():
            first, self.stored = self.stored, self.stored + prod(entry["shape"])
            if entry["data_offsets"] != [first * self.dtype.itemsize, self.stored * self.dtype.itemsize]:
                raise VectorError(f"{self.where}: shape and place of {name} do not fit; the file is damaged")
        self.mask: MaskFile | None = None
        if sparse:
            folder = posixpath.dirname(key)
            self.mask_key = posixpath.normpath(posixpath.join(folder, self.info["mask"]))
            if self.mask_key.startswith(("../", "/")):
                raise VectorError(f"{self.where}: its mask {self.info['mask']} lies outside of {store.url}")
            self.mask = MaskFile(store, self.mask_key)
            if self.mask.fingerprint != self.info["mask_fingerprint"] or self.mask.kept != self.stored:
                raise VectorError(f"{self.where} was made with another mask than {store.where(self.mask_key)}")

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> VectorFile:
        """From a path or URL outside of any experiment. The store is rooted where the mask can be reached too."""
        url = os.fspath(url)
        folder, name = posixpath.split(url)
        folder = Store(folder or ".").url  # absolute, so that the levels below are all there
        levels: list[str] = []
        header = Header.read(Store(folder), name)
        for _ in range(str(header.info.get("mask", "")).count("../")):
            above, last = posixpath.split(folder)
            if not last or above.endswith(":/"):  # the root, or a bucket
                break
            folder = above
            levels.insert(0, last)
        return cls(Store(folder), posixpath.join(*levels, name))

    @property
    def where(self) -> str:
        """The file's path, for messages."""
        return self.store.where(self.key)

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name, also where only some of their entries are stored."""
        if self.mask is None:
            return self.shapes
        return {n: tuple(s) for n, s in sorted(self.mask.info["shapes"].items())}

    def byte_range(self, start: int, stop: int) -> tuple[int, int]:
        """Where stored values start..stop lie in the file."""
        width = self.dtype.itemsize
        return self.data_start + start * width, self.data_start + stop * width

    def read_into(self, start: int, out: Tensor) -> None:
        """Stored values start..start + len(out) into `out`, float32 and contiguous."""
        raw = out if self.dtype == out.dtype else torch.empty(len(out), dtype=self.dtype)
        first, last = self.byte_range(start, start + len(out))
        if start + len(out) > self.stored:
            raise VectorError(f"{self.where} has {self.stored} values; {start}..{start + len(out)} were asked for")
        self.store.read_into(self.key, first, raw.view(torch.uint8).numpy().data[:last - first])
        if raw is not out:
            out.copy_(raw)

    def values(self, start: int, stop: int) -> Tensor:
        """Stored values start..stop as float32."""
        out = torch.empty(max(0, stop - start))
        self.read_into(start, out)
        return out

    def not_finite(self) -> list[str]:
        """Names of the tensors with NaN or infinite values; reads the whole file in blocks."""
        bad, first = [], 0
        for name, shape in self.shapes.items():
            last = first + prod(shape)
            parts = (self.values(a, min(a + 16 * BLOCK, last)) for a in range(first, last, 16 * BLOCK))
            if not all(bool(torch.isfinite(p).all()) for p in parts):
                bad.append(name)
            first = last
        return bad

    def complain(self) -> VectorError:
        """The error for a vector whose inner products are not finite, naming tensors."""
        bad = self.not_finite()
        if not bad:
            return VectorError(f"{self.where} has values so large that their products are infinite")
        names = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        return VectorError(f"{self.where} has NaN or infinite values in {names}")


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
            check_pair(first, file, compact=self.compact)
        self.parameters = first.parameters
        self.mask = first.mask if self.compact else None
        self.count = first.stored if self.compact else sum(prod(s) for s in self.parameters.values())

    def read_into(self, index: int, start: int, out: Tensor) -> None:
        """Coordinates from `start` of vector `index` into `out`; zero where its own mask keeps nothing."""
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
        """All coordinates as consecutive (start, rows (T, n) float32): the next block is read while one is used.

        The rows are a buffer that is written again: they are good until the next is asked for. Memory: two blocks of
        T * columns float32 values (64 MB each by default).
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
            rows = buffers[number % 2][:count * width].view(count, width)
            return rows, [pool.submit(self.read_into, i, starts[number], rows[i]) for i in range(count)]

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
        """sum_t weights[t, k] * v_t over the common coordinates, for each k in turn; weights (T, K) float64.

        Each is float32 (count,). As many as fit in 512 MB are made in one pass over the vectors; a vector that none of
        them has weight for is not read.
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


def combinations(blocks: Callable[[], Iterator[tuple[int, Tensor]]], count: int, weights: Tensor) -> Iterator[Tensor]:
    """Columns of V @ weights (count,) float32 one after the other; `blocks` gives (start, rows of V' (T, n)) anew."""
    for part in weights.split(_together(count), dim=1):
        factors = part.T.to(torch.float32).contiguous()
        out = torch.zeros(factors.shape[0], count)
        if factors.any():
            for start, rows in blocks():
                out[:, start:start + rows.shape[1]] = factors @ rows
        yield from out


def check_pair(first: VectorFile, file: VectorFile, *, compact: bool) -> None:
    """Raise VectorError that names both where two vectors do not belong together.

    compact: the stored values are to be the common coordinates, so the masks must be the same.
    """
    if file.info["base"] != first.info["base"]:
        raise VectorError(f"{first.where} and {file.where} are differences from different pretrained models")
    if compact and file.info.get("mask_fingerprint") != first.info.get("mask_fingerprint"):
        raise VectorError(f"{first.where} and {file.where} have different masks")
    if compact and file.shapes != first.shapes:
        raise VectorError(f"{first.where} and {file.where} have tensors of different names or shapes")
    if file.parameters != first.parameters:
        raise VectorError(f"{first.where} and {file.where} have parameters of different names or shapes")
