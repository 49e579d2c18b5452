"""Bases on disk: S = V B written and read in pieces of at most 32 MB, so that no process holds a whole basis.

A basis is a folder of safetensors files, each a range of the coordinates of all its vectors, and an index as the
Hugging Face hub has it (`weight_map`: tensor to file). A tensor is named after its parameter and stacks the M basis
vectors: (M, *shape), or (M, kept) where the vectors share a mask. A tensor in which a file ends is cut, and its parts
are named `parameter[start:stop]` by flat positions. Values are float32.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from os import PathLike, fspath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.masks import BLOCK, MaskFile
from raytvb.records import RECORD, FileInfo, commit, find
from raytvb.store import Store
from raytvb.vectors import VectorFile, VectorSet, combinations, vector_info

INDEX = "basis.safetensors.index.json"
SEGMENT = 16 * BLOCK  # coordinates: files never cross a multiple of it, so that writers can share a basis
_FILE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Layout:
    """The coordinates that basis vectors have, those of the task vectors they are made of."""

    base: str
    """Fingerprint of the pretrained model."""
    parameters: Mapping[str, tuple[int, ...]]
    """Shapes of the parameters, names sorted."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of what is stored: those of the parameters, or (kept,) where there is a mask."""
    mask_key: str | None = None
    mask: str | None = None
    """Fingerprint of the shared mask."""

    @property
    def count(self) -> int:
        """Number of coordinates."""
        return sum(prod(s) for s in self.shapes.values())

    def info(self, prefix: str) -> dict[str, Any]:
        """Metadata of files in the folder `prefix`."""
        path = None if self.mask_key is None else posixpath.relpath(self.mask_key, prefix)
        return vector_info(self.base, mask_path=path, mask=self.mask)


def file_columns(size: int) -> int:
    """Coordinates in each file of a basis of `size` vectors: a power of two that divides SEGMENT, at most 32 MB."""
    return min(SEGMENT, max(4096, 1 << (max(1, _FILE_BYTES // (4 * size)).bit_length() - 1)))


def file_names(size: int, count: int) -> list[str]:
    """The files of a basis of `size` vectors of `count` coordinates."""
    total = max(1, -(-count // file_columns(size)))
    return [f"basis-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]


def _pieces(shapes: Mapping[str, tuple[int, ...]], start: int, stop: int) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """(tensor name, number of coordinates, shape) of what lies in coordinates start..stop, in their order."""
    first = 0
    for name, shape in shapes.items():
        last = first + prod(shape)
        low, high = max(first, start), min(last, stop)
        if low < high:
            whole = high - low == last - first
            yield (name, high - low, shape) if whole else (f"{name}[{low - first}:{high - first}]", high - low,
                                                           (high - low,))
        first = last


class _Writer:
    """The files of one basis on a range of coordinates, each written when it is full."""

    def __init__(self, store: Store, prefix: str, weights: Tensor, layout: Layout, stop: int) -> None:
        self.weights = weights.T.to(torch.float32).contiguous()
        self.infos: dict[str, FileInfo] = {}
        self._store, self._prefix, self._layout, self._stop = store, prefix, layout, stop
        size = weights.shape[1]
        self._columns, self._names = file_columns(size), file_names(size, layout.count)
        self._buffer = torch.empty(size, min(self._columns, max(layout.count, 1)))

    def put(self, start: int, rows: Tensor) -> None:
        """Take weights.T @ rows for coordinates from `start` on, which follow those of the call before."""
        while rows.shape[1]:
            at = start % self._columns
            part = rows[:, :self._columns - at]
            self._buffer[:, at:at + part.shape[1]] = self.weights @ part
            start += part.shape[1]
            rows = rows[:, part.shape[1]:]
            if start % self._columns == 0 or start == self._stop:
                self._flush(start - at - part.shape[1], start)

    def _flush(self, start: int, stop: int) -> None:
        name = self._names[start // self._columns]
        if not bool(torch.isfinite(self._buffer[:, :stop - start]).all()):
            raise VectorError(f"{self._store.where(self._prefix)} would have NaN or infinite values: a vector has "
                              f"them, or the weights have")
        tensors, first = {}, 0
        for tensor, count, shape in _pieces(self._layout.shapes, start, stop):
            tensors[tensor] = self._buffer[:, first:first + count].reshape(-1, *shape).contiguous()
            first += count
        info = self._layout.info(self._prefix) | {"coordinates": [start, stop]}
        data = save(tensors, metadata={"raytvb": json.dumps(info, sort_keys=True)})
        self._store.write(f"{self._prefix}/{name}", data)
        self.infos[name] = FileInfo.of(data)


def write_pieces(blocks: Iterable[tuple[int, Tensor]], outputs: Sequence[tuple[str, Tensor]], layout: Layout,
                 store: Store, stop: int) -> dict[str, dict[str, FileInfo]]:
    """Write the files of V @ weights for each (folder, weights (T, M) float64) in one pass over the blocks of V.

    blocks: (start, rows (T, n) float32) that follow each other up to coordinate `stop`, from a multiple of SEGMENT on,
    and begin at multiples of BLOCK. Products are taken over 65,536 coordinates and each by itself, so the bits of a
    file depend neither on the other outputs nor on how the coordinates are shared among writers.
    Returns checksums by folder and file. Memory: 32 MB for each output.
    """
    writers = {prefix: _Writer(store, prefix, weights, layout, stop) for prefix, weights in outputs}
    for start, rows in blocks:
        if rows.shape[1] == 1:  # as a single column of something wider, which BLAS multiplies another way
            rows = rows.repeat(1, 2)[:, :1]
        for first in range(0, rows.shape[1], BLOCK):
            for writer in writers.values():
                writer.put(start + first, rows[:, first:first + BLOCK])
    return {prefix: writer.infos for prefix, writer in writers.items()}


def write_combinations(paths: Sequence[str | PathLike[str]], outputs: Mapping[str, Tensor],
                       url: str | PathLike[str]) -> dict[str, dict[str, FileInfo]]:
    """Write V @ weights of vector files into the store `url`, a folder for each {name: weights (T, M) float64}.

    One pass over the vectors for all of them: bases (weights B), or K candidate merges (a column each). Every folder is
    a basis that `StoredBasis(url, name)` reads; its record is written last. Memory: two buffers of 64 MB and 32 MB for
    each output. What such a call wrote before into a folder, from as many vectors of that model, is replaced. Raises
    VectorError for files that are damaged or do not belong together and for results that are not finite, ValueError
    for weights that do not have a row for each vector, UserError for a folder with a record of something else.
    """
    vectors, store = VectorSet([VectorFile.open(p) for p in paths]), Store(fspath(url))
    outputs = {name: torch.as_tensor(weights) for name, weights in outputs.items()}
    for name, weights in outputs.items():
        if weights.ndim != 2 or len(weights) != len(paths) or not weights.shape[1]:
            raise ValueError(f"weights of {name} must be ({len(paths)}, M), not {tuple(weights.shape)}")
    identity = {"base": vectors.files[0].info["base"], "vectors": len(paths)}
    for name, record in {name: find(store, name, identity) for name in outputs}.items():
        for old in (RECORD, *record["files"]) if record else ():
            store.delete(f"{name}/{old}")
    mask_key, shapes = None, vectors.parameters
    if vectors.compact:
        shapes = vectors.files[0].shapes
    if vectors.mask is not None:
        mask_key = f"masks/{vectors.mask.fingerprint[:16]}/mask.safetensors"
        store.write(mask_key, vectors.files[0].store.read(vectors.files[0].mask_key))
    layout = Layout(identity["base"], vectors.parameters, shapes, mask_key,
                    vectors.mask.fingerprint if vectors.mask else None)
    files = write_pieces(vectors.blocks(), list(outputs.items()), layout, store, vectors.count)
    for name, weights in outputs.items():
        index = {INDEX: index_bytes(layout, weights.shape[1], name)}
        commit(store, name, identity=identity, written=files[name], files=index | {
            "coefficients.safetensors": save({"B": weights.double().contiguous().clone()})})
    return files


def index_bytes(layout: Layout, size: int, prefix: str) -> bytes:
    """The index of a basis of `size` vectors: which file has which tensor, and what the coordinates are."""
    columns, where = file_columns(size), dict[str, str]()
    for number, name in enumerate(file_names(size, layout.count)):
        start = number * columns
        where |= {t: name for t, _, _ in _pieces(layout.shapes, start, min(start + columns, layout.count))}
    shapes = {n: list(s) for n, s in layout.shapes.items()}
    document = {"metadata": {"total_size": 4 * size * layout.count, "size": size, "shapes": shapes,
                             "parameters": {n: list(s) for n, s in layout.parameters.items()},
                             "raytvb": layout.info(prefix)}, "weight_map": where}
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


class StoredBasis:
    """A basis in a store, read file by file."""

    def __init__(self, store: Store | str | PathLike[str], prefix: str) -> None:
        """Reads the index (and the mask's header). Raises VectorError where they are not those of a basis.

        store: or its URL; prefix: the folder of the basis in it.
        """
        store = store if isinstance(store, Store) else Store(fspath(store))
        self.store, self.prefix = store, prefix
        try:
            document = json.loads(store.read(f"{prefix}/{INDEX}"))
            metadata = document["metadata"]
            info = metadata["raytvb"]
            self.size = int(metadata["size"])
            self.parameters = {n: tuple(s) for n, s in sorted(metadata["parameters"].items())}
            shapes = {n: tuple(s) for n, s in sorted(metadata["shapes"].items())}
            key = posixpath.normpath(posixpath.join(prefix, info["mask"])) if "mask" in info else None
            self.layout = Layout(info["base"], self.parameters, shapes, key, info.get("mask_fingerprint"))
            if self.size < 1:
                raise ValueError(f"{self.size} vectors")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise VectorError(f"{store.where(prefix)}/{INDEX} is not the index of a basis: {error!r}") from None
        self.mask = None if key is None else MaskFile(store, key)
        if self.mask is not None and self.mask.fingerprint != self.layout.mask:
            raise VectorError(f"{store.where(prefix)} was made with another mask than {store.where(str(key))}")
        self.count = self.layout.count
        self._held: tuple[int, Tensor] | None = None

    @property
    def files(self) -> list[str]:
        """Keys of its files, in the order of their coordinates."""
        return [f"{self.prefix}/{name}" for name in file_names(self.size, self.count)]

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Consecutive (start, rows (M, n) float32), a file at a time; `start` and `stop` are where files begin or end.

        Raises VectorError that names a file which does not hold what the index says.
        """
        columns = file_columns(self.size)
        stop = self.count if stop is None else stop
        for first in range(start, stop, columns):
            last = min(first + columns, self.count)
            key = self.files[first // columns]
            data = self.store.read(key)
            try:
                tensors = load(data)
                parts = [tensors[name].reshape(self.size, count)
                         for name, count, _ in _pieces(self.layout.shapes, first, last)]
            except (SafetensorError, KeyError, RuntimeError) as error:
                raise VectorError(f"{self.store.where(key)} is damaged: {error!r}") from None
            yield first, torch.cat(parts, dim=1)

    def read_into(self, start: int, out: Tensor) -> None:
        """Coordinates from `start` on of all vectors into `out` (M, n); the last file is kept for the next call."""
        columns, done = file_columns(self.size), 0
        if not 0 <= start <= self.count - out.shape[1]:
            raise ValueError(f"{self.prefix} has {self.count} coordinates; {start}..{start + out.shape[1]} asked for")
        while done < out.shape[1]:
            first = (start + done) // columns * columns
            if self._held is None or self._held[0] != first:
                self._held = next(self.blocks(first))
            part = self._held[1][:, start + done - first:start + out.shape[1] - first]
            out[:, done:done + part.shape[1]] = part
            done += part.shape[1]

    def read_all(self, start: int, count: int) -> Tensor:
        """Coordinates start..start + count of every basis vector, float32 (M, count)."""
        out = torch.empty(self.size, count)
        self.read_into(start, out)
        return out

    def combinations(self, weights: Tensor) -> Iterator[Tensor]:
        """As `VectorSet.combinations`, of the basis vectors: weights (M, K)."""
        return combinations(self.blocks, self.count, weights)
