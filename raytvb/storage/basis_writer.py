"""Bases written in pieces: S = V B in one pass over the vectors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath

import torch
from safetensors.torch import save
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.maths.gram import BLOCK
from raytvb.storage.basis_layout import (
    INDEX,
    Layout,
    file_columns,
    file_names,
    index_bytes,
    pieces_of,
)
from raytvb.storage.records import RECORD, FileInfo, commit, find
from raytvb.storage.store import Store
from raytvb.storage.vector_set import VectorSet
from raytvb.storage.vectors import VectorFile


class _Writer:
    """The files of one basis on a range of coordinates, each written when it is full."""

    def __init__(
        self, store: Store, prefix: str, weights: Tensor, layout: Layout, stop: int
    ) -> None:
        self.weights = weights.T.to(torch.float32).contiguous()
        self.infos: dict[str, FileInfo] = {}
        self._store, self._prefix, self._layout, self._stop = store, prefix, layout, stop
        size = weights.shape[1]
        self._columns, self._names = file_columns(size), file_names(size, layout.count)
        self._buffer = torch.empty(size, min(self._columns, max(layout.count, 1)))

    def put(self, start: int, rows: Tensor) -> None:
        """Take weights.T @ rows for coordinates from `start` on, which follow those of the call
        before.
        """
        while rows.shape[1]:
            at = start % self._columns
            part = rows[:, : self._columns - at]
            self._buffer[:, at : at + part.shape[1]] = self.weights @ part
            start += part.shape[1]
            rows = rows[:, part.shape[1] :]
            if start % self._columns == 0 or start == self._stop:
                self._flush(start - at - part.shape[1], start)

    def _flush(self, start: int, stop: int) -> None:
        name = self._names[start // self._columns]
        if not bool(torch.isfinite(self._buffer[:, : stop - start]).all()):
            raise VectorError(
                f"{self._store.where(self._prefix)} would have NaN or infinite values: a vector has "
                f"them, or the weights have"
            )
        tensors, first = {}, 0
        for tensor, count, shape in pieces_of(self._layout.shapes, start, stop):
            tensors[tensor] = (
                self._buffer[:, first : first + count].reshape(-1, *shape).contiguous()
            )
            first += count
        info = self._layout.info(self._prefix) | {"coordinates": [start, stop]}
        data = save(tensors, metadata={"raytvb": json.dumps(info, sort_keys=True)})
        self._store.write(f"{self._prefix}/{name}", data)
        self.infos[name] = FileInfo.of(data)


def write_pieces(
    blocks: Iterable[tuple[int, Tensor]],
    outputs: Sequence[tuple[str, Tensor]],
    layout: Layout,
    store: Store,
    stop: int,
) -> dict[str, dict[str, FileInfo]]:
    """Write the files of V @ weights for each (folder, weights (T, M) float64) in one pass over the
    blocks of V.

    blocks: (start, rows (T, n) float32) that follow each other up to coordinate `stop`, from a
    multiple of SEGMENT on, and begin at multiples of BLOCK. Products are taken over 65,536
    coordinates and each by itself, so the bits of a file depend neither on the other outputs nor on
    how the coordinates are shared among writers.
    Returns checksums by folder and file. Memory: 32 MB for each output.
    """
    writers = {prefix: _Writer(store, prefix, weights, layout, stop) for prefix, weights in outputs}
    for start, rows in blocks:
        if (
            rows.shape[1] == 1
        ):  # as a single column of something wider, which BLAS multiplies another way
            rows = rows.repeat(1, 2)[:, :1]
        for first in range(0, rows.shape[1], BLOCK):
            for writer in writers.values():
                writer.put(start + first, rows[:, first : first + BLOCK])
    return {prefix: writer.infos for prefix, writer in writers.items()}


def write_combinations(
    paths: Sequence[str | PathLike[str]], outputs: Mapping[str, Tensor], url: str | PathLike[str]
) -> dict[str, dict[str, FileInfo]]:
    """Write V @ weights of vector files into the store `url`, a folder for each {name: weights (T,
    M) float64}.

    One pass over the vectors for all of them: bases (weights B), or K candidate merges (a column
    each). Every folder is a basis that `StoredBasis(url, name)` reads; its record is written last.
    Memory: two buffers of 64 MB and 32 MB for each output. What such a call wrote before into a
    folder, from as many vectors of that model, is replaced. Raises VectorError for files that are
    damaged or do not belong together and for results that are not finite, ValueError for weights
    that do not have a row for each vector, UserError for a folder with a record of something else.
    """
    vectors, store = VectorSet([VectorFile.open(p) for p in paths]), Store(fspath(url))
    outputs = {name: torch.as_tensor(weights) for name, weights in outputs.items()}
    for name, weights in outputs.items():
        if weights.ndim != 2 or len(weights) != len(paths) or not weights.shape[1]:
            raise ValueError(
                f"weights of {name} must be ({len(paths)}, M), not {tuple(weights.shape)}"
            )
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
    layout = Layout(
        identity["base"],
        vectors.parameters,
        shapes,
        mask_key,
        vectors.mask.fingerprint if vectors.mask else None,
    )
    files = write_pieces(vectors.blocks(), list(outputs.items()), layout, store, vectors.count)
    for name, weights in outputs.items():
        index = {INDEX: index_bytes(layout, weights.shape[1], name)}
        commit(
            store,
            name,
            identity=identity,
            written=files[name],
            files=index
            | {"coefficients.safetensors": save({"B": weights.double().contiguous().clone()})},
        )
    return files
