"""Bases written in pieces: S = V B in one pass over the vectors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath

import torch
from safetensors.torch import save
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.maths.gram_blocks import BLOCK
from raytvb.storage.basis_layout import (
    INDEX,
    Layout,
    file_columns,
    file_names,
    index_bytes,
    pieces_of,
)
from raytvb.storage.contract import JsonObject
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
        """Put weights.T @ rows into the files, rows (T, n), for the coordinates from `start` on.

        Calls must follow each other: `start` is where the call before ended.
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
                f"{self._store.where(self._prefix)} would have NaN or infinite values: a vector or "
                f"the weights have such values"
            )
        tensors: dict[str, Tensor] = {}
        first = 0
        for piece in pieces_of(self._layout.shapes, start, stop):
            values = self._buffer[:, first : first + piece.count]
            tensors[piece.tensor] = values.reshape(-1, *piece.shape).contiguous()
            first += piece.count
        info = {**self._layout.info(self._prefix).to_json(), "coordinates": [start, stop]}
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
    """Write the files of V @ weights in one pass over the blocks of V.

    blocks: (start, rows (T, n) float32) that follow each other up to coordinate `stop`. The first
    block starts at a multiple of SEGMENT, and every block at a multiple of BLOCK. outputs: folders
    and weights (T, M) float64.

    Products are taken over 65,536 coordinates, and separately for each output. So the bits of a
    file depend neither on the other outputs nor on how the coordinates are shared among writers.
    Returns checksums by folder and file. Memory: 32 MB for each output. Raises VectorError for
    values that are not finite.
    """
    writers = {prefix: _Writer(store, prefix, weights, layout, stop) for prefix, weights in outputs}
    for start, rows in blocks:
        if rows.shape[1] == 1:
            # BLAS multiplies a matrix of one column in another way. As a part of two columns, this
            # column is multiplied like those of other blocks.
            rows = rows.repeat(1, 2)[:, :1]
        for first in range(0, rows.shape[1], BLOCK):
            for writer in writers.values():
                writer.put(start + first, rows[:, first : first + BLOCK])
    return {prefix: writer.infos for prefix, writer in writers.items()}


def write_combinations(
    paths: Sequence[str | PathLike[str]], outputs: Mapping[str, Tensor], url: str | PathLike[str]
) -> dict[str, dict[str, FileInfo]]:
    """Write V @ weights of vector files into the store `url`, one folder for each output.

    outputs: weights (T, M) float64 by name of the folder. They may be bases (B), or candidate
    merges, one in each column. All are written in one pass over the vectors. Every folder is a
    basis that `StoredBasis(url, name)` reads; its record is written last. If an earlier call wrote
    the folder, from as many vectors of the same model, its files are replaced. Memory: two buffers
    of 64 MB, and 32 MB for each output.

    Returns checksums by folder and file. Raises VectorError for files that are damaged or do not
    belong together and for results that are not finite, ValueError for weights that do not have a
    row for each vector, and UserError for a folder that holds something else.
    """
    vectors, store = VectorSet([VectorFile.open(p) for p in paths]), Store(fspath(url))
    weights_of = {name: torch.as_tensor(weights) for name, weights in outputs.items()}
    for name, weights in weights_of.items():
        if weights.ndim != 2 or len(weights) != len(paths) or not weights.shape[1]:
            raise ValueError(
                f"weights of {name} must be ({len(paths)}, M), not {tuple(weights.shape)}"
            )
    identity: JsonObject = {"base": vectors.files[0].info.base, "vectors": len(paths)}
    _delete_replaced(store, list(weights_of), identity)
    layout = _write_layout(store, vectors)
    files = write_pieces(vectors.blocks(), list(weights_of.items()), layout, store, vectors.count)
    for name, weights in weights_of.items():
        B = weights.double().contiguous().clone()
        commit(
            store,
            name,
            identity=identity,
            written=files[name],
            files={
                INDEX: index_bytes(layout, weights.shape[1], name),
                "coefficients.safetensors": save({"B": B}),
            },
        )
    return files


def _delete_replaced(store: Store, names: Sequence[str], identity: JsonObject) -> None:
    """Delete what the folders hold.

    If one of them holds something else, raises UserError and deletes nothing.
    """
    replaced = {name: find(store, name, identity) for name in names}
    for name, record in replaced.items():
        if record is not None:
            for file in (RECORD, *record.files):
                store.delete(f"{name}/{file}")


def _write_layout(store: Store, vectors: VectorSet) -> Layout:
    """The layout of the vectors. If the vectors share a mask, it is copied into the store."""
    first = vectors.files[0]
    shapes = first.shapes if vectors.compact else vectors.parameters
    if vectors.mask is None:
        return Layout(first.info.base, vectors.parameters, shapes)
    fingerprint = vectors.mask.fingerprint
    mask_key = f"masks/{fingerprint[:16]}/mask.safetensors"
    store.write(mask_key, first.store.read(first.mask_key))
    return Layout(first.info.base, vectors.parameters, shapes, mask_key, fingerprint)
