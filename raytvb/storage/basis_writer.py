"""Bases written in pieces: S = V B in one pass over the vectors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from os import PathLike, fspath
from types import MappingProxyType

import torch
from safetensors.torch import save
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.maths.finite import listed, not_finite
from raytvb.maths.gram_blocks import BLOCK
from raytvb.storage.basis_layout import (
    INDEX,
    Layout,
    file_columns,
    file_names,
    index_bytes,
    pieces_of,
)
from raytvb.storage.checked_file import CheckedFile
from raytvb.storage.contract import JsonObject
from raytvb.storage.damage import DamagedError
from raytvb.storage.records import FileInfo, find
from raytvb.storage.replacing import commit_over, new_tag, tagged
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError
from raytvb.storage.vector_set import VectorSet
from raytvb.storage.vectors import VectorFile

NO_TAGS: Mapping[str, str] = MappingProxyType({})
"""For bases that are written for the first time."""


class _Writer:
    """The files of one basis on a range of coordinates, each written when it is full."""

    def __init__(
        self, store: Store, prefix: str, weights: Tensor, layout: Layout, stop: int, tag: str
    ) -> None:
        self.weights = weights.T.to(torch.float32).contiguous()
        self.infos: dict[str, FileInfo] = {}
        self._store, self._prefix, self._layout, self._stop = store, prefix, layout, stop
        size = weights.shape[1]
        self._columns, self._names = file_columns(size), file_names(size, layout.count, tag)
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
        tensors: dict[str, Tensor] = {}
        first = 0
        for piece in pieces_of(self._layout.shapes, start, stop):
            values = self._buffer[:, first : first + piece.count]
            tensors[piece.tensor] = values.reshape(-1, *piece.shape).contiguous()
            first += piece.count
        self._check_finite(tensors)
        info = {**self._layout.info(self._prefix).to_json(), "coordinates": [start, stop]}
        data = save(tensors, metadata={"raytvb": json.dumps(info, sort_keys=True)})
        self._store.write(f"{self._prefix}/{name}", data)
        self.infos[name] = FileInfo.of(data)

    def _check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        bad = not_finite(tensors)
        if bad:
            raise VectorError(
                f"{self._store.where(self._prefix)} would have NaN or infinite values in "
                f"{listed(bad)}: a vector has such values, or the weights are too large",
                "use smaller weights, and vectors whose values are finite",
            )

    def discard(self) -> None:
        """Delete the files that were written so far, as far as the storage allows."""
        for name in self.infos:
            with suppress(StoreError):
                self._store.delete(f"{self._prefix}/{name}")


def write_pieces(
    blocks: Iterable[tuple[int, Tensor]],
    outputs: Sequence[tuple[str, Tensor]],
    layout: Layout,
    store: Store,
    stop: int,
    tags: Mapping[str, str] = NO_TAGS,
) -> dict[str, dict[str, FileInfo]]:
    """Write the files of V @ weights in one pass over the blocks of V.

    blocks: (start, rows (T, n) float32) that follow each other up to coordinate `stop`. The first
    block starts at a multiple of SEGMENT, and every block at a multiple of BLOCK. outputs: folders
    and weights (T, M) float64. tags: by folder, the tag in the names of the files (see
    `file_names`); '' for folders that it lacks.

    Products are taken over 65,536 coordinates, and separately for each output. So the bits of a
    file depend neither on the other outputs nor on how the coordinates are shared among writers.
    Returns checksums by folder and file. Memory: 32 MB for each output. Raises VectorError for
    values that are not finite. After an error the files that this call has written are deleted.
    """
    writers: dict[str, _Writer] = {}
    for prefix, weights in outputs:
        writers[prefix] = _Writer(store, prefix, weights, layout, stop, tags.get(prefix, ""))
    try:
        _write_blocks(blocks, list(writers.values()))
    except Exception:
        for writer in writers.values():
            writer.discard()
        raise
    return {prefix: writer.infos for prefix, writer in writers.items()}


def _write_blocks(blocks: Iterable[tuple[int, Tensor]], writers: Sequence[_Writer]) -> None:
    """Put all blocks into the files of every writer."""
    for start, rows in blocks:
        if rows.shape[1] == 1:
            # BLAS multiplies a matrix of one column in another way. As a part of two columns, this
            # column is multiplied like those of other blocks.
            rows = rows.repeat(1, 2)[:, :1]
        for first in range(0, rows.shape[1], BLOCK):
            for writer in writers:
                writer.put(start + first, rows[:, first : first + BLOCK])


def write_combinations(
    paths: Sequence[str | PathLike[str]], outputs: Mapping[str, Tensor], url: str | PathLike[str]
) -> dict[str, dict[str, FileInfo]]:
    """Write V @ weights of vector files into the store `url`, one folder for each output.

    outputs: weights (T, M) float64 by name of the folder. They may be bases (B), or candidate
    merges, one in each column. All are written in one pass over the vectors. Every folder is a
    basis that `StoredBasis(url, name)` reads; its record is written last. If an earlier call wrote
    the folder, from as many vectors of the same model, the basis is replaced: the old one is there
    as a whole until the new one is. Memory: two buffers of 64 MB, and 32 MB for each output.

    Returns checksums by folder and file. Raises VectorError for files that are damaged or do not
    belong together and for weights or results that are not finite, ValueError for weights that do
    not have a row for each vector, and UserError for a folder that holds something else. All of
    these leave the store as it was.
    """
    vectors, store = VectorSet([VectorFile.open(p) for p in paths]), Store(fspath(url))
    weights_of = {name: torch.as_tensor(weights) for name, weights in outputs.items()}
    for name, weights in weights_of.items():
        _check_weights(name, weights, len(paths))
    identity: JsonObject = {"base": vectors.files[0].info.base, "vectors": len(paths)}
    for name in weights_of:
        find(store, name, identity)  # UserError if the folder holds something else
    tags: dict[str, str] = {}
    for name, weights in weights_of.items():
        tags[name] = new_tag(store, name, weights.double().contiguous().numpy().tobytes())
    layout = _layout_of(vectors)
    files = _write_finite(vectors, weights_of, layout, store, tags)
    _copy_mask(store, vectors, layout)
    for name, weights in weights_of.items():
        B = weights.double().contiguous().clone()
        commit_over(
            store,
            name,
            identity=identity,
            written=files[name],
            files={
                tagged(INDEX, tags[name]): index_bytes(layout, weights.shape[1], name, tags[name]),
                tagged("coefficients.safetensors", tags[name]): save({"B": B}),
            },
        )
    return files


def _check_weights(name: str, weights: Tensor, rows: int) -> None:
    """Raise ValueError for weights of another shape, VectorError for values that are not finite."""
    if weights.ndim != 2 or len(weights) != rows or not weights.shape[1]:
        raise ValueError(f"weights of {name} must be ({rows}, M), not {tuple(weights.shape)}")
    count = int((~torch.isfinite(weights)).sum())
    if count:
        raise VectorError(
            f"weights of {name}: {count} of {weights.numel()} are NaN or infinite",
            "nothing was written",
        )


def _write_finite(
    vectors: VectorSet,
    weights_of: Mapping[str, Tensor],
    layout: Layout,
    store: Store,
    tags: Mapping[str, str],
) -> dict[str, dict[str, FileInfo]]:
    """As `write_pieces`. If a vector has values that are not finite, the error names it."""
    outputs = list(weights_of.items())
    try:
        return write_pieces(vectors.blocks(), outputs, layout, store, vectors.count, tags)
    except DamagedError:
        raise
    except VectorError:
        for file in vectors.files:
            if file.not_finite():
                error = file.complain()
                raise error.with_remedy("make the vector again, or leave it out") from None
        raise


def _layout_of(vectors: VectorSet) -> Layout:
    """The layout of bases of these vectors. If the vectors share a mask, the store has a copy."""
    first = vectors.files[0]
    shapes = first.shapes if vectors.compact else vectors.parameters
    if vectors.mask is None:
        return Layout(first.info.base, vectors.parameters, shapes)
    fingerprint = vectors.mask.fingerprint
    mask_key = f"masks/{fingerprint[:16]}/mask.safetensors"
    return Layout(first.info.base, vectors.parameters, shapes, mask_key, fingerprint)


def _copy_mask(store: Store, vectors: VectorSet, layout: Layout) -> None:
    """Copy the mask that the vectors share into the store."""
    first = vectors.files[0]
    if layout.mask_key is not None:
        mask = CheckedFile.find(first.store, first.mask_key)
        store.write(layout.mask_key, mask.read())
