"""Stored bases, read file by file."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping
from os import PathLike, fspath

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.storage.basis_layout import (
    INDEX,
    BasisMetadata,
    Layout,
    file_columns,
    file_names,
    pieces_of,
)
from raytvb.storage.format_version import format_problem
from raytvb.storage.masks import MaskFile
from raytvb.storage.store import Store
from raytvb.storage.vector_set import combinations


class StoredBasis:
    """A basis in a store, read file by file."""

    def __init__(self, store: Store | str | PathLike[str], prefix: str) -> None:
        """Reads the index (and the mask's header).

        store: the store or its URL. prefix: the folder of the basis in the store. Raises
        VectorError for a folder without a basis index, a basis of a newer raytvb, and a mask that
        does not match the basis; StoreKeyError if the index is missing.
        """
        store = store if isinstance(store, Store) else Store(fspath(store))
        self.store, self.prefix = store, prefix
        metadata = _read_index(store, prefix)
        self.size = metadata.size
        self.parameters = _sorted_by_name(metadata.parameters)
        info = metadata.raytvb
        mask_key = None
        if info.mask is not None:
            mask_key = posixpath.normpath(posixpath.join(prefix, info.mask))
        shapes = _sorted_by_name(metadata.shapes)
        self.layout = Layout(info.base, self.parameters, shapes, mask_key, info.mask_fingerprint)
        self.mask = None if mask_key is None else MaskFile(store, mask_key)
        if self.mask is not None and self.mask.fingerprint != self.layout.mask:
            raise VectorError(
                f"{store.where(prefix)} was made with another mask than "
                f"{store.where(str(mask_key))}"
            )
        self.count = self.layout.count
        self._held: tuple[int, Tensor] | None = None

    @property
    def files(self) -> list[str]:
        """Keys of the basis's tensor files, in the order of their coordinates."""
        return [f"{self.prefix}/{name}" for name in file_names(self.size, self.count)]

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Consecutive (start, rows (M, n) float32), one file at a time.

        `start` and `stop` (default: the end) must be where files begin or end. Raises VectorError
        that names a file whose contents do not match the index.
        """
        columns = file_columns(self.size)
        stop = self.count if stop is None else stop
        for first in range(start, stop, columns):
            last = min(first + columns, self.count)
            key = self.files[first // columns]
            yield first, self._rows(key, first, last)

    def _rows(self, key: str, first: int, last: int) -> Tensor:
        """The values of one file, which has the coordinates first..last: (M, last - first)."""
        data = self.store.read(key)
        parts: list[Tensor] = []
        try:
            tensors = load(data)
            for piece in pieces_of(self.layout.shapes, first, last):
                parts.append(tensors[piece.tensor].reshape(self.size, piece.count))
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise VectorError(f"{self.store.where(key)} is damaged: {error!r}") from None
        return torch.cat(parts, dim=1)

    def read_into(self, start: int, out: Tensor) -> None:
        """Read coordinates from `start` on of all basis vectors into `out` (M, n) float32.

        The last file is kept in memory for the next call. Raises ValueError for coordinates that
        the basis does not have, and VectorError as `blocks`.
        """
        columns, done = file_columns(self.size), 0
        if not 0 <= start <= self.count - out.shape[1]:
            stop = start + out.shape[1]
            raise ValueError(f"{self.prefix} has {self.count} coordinates, not {start}..{stop}")
        while done < out.shape[1]:
            first = (start + done) // columns * columns
            if self._held is None or self._held[0] != first:
                self._held = next(self.blocks(first))
            part = self._held[1][:, start + done - first : start + out.shape[1] - first]
            out[:, done : done + part.shape[1]] = part
            done += part.shape[1]

    def read_all(self, start: int, count: int) -> Tensor:
        """Coordinates start..start + count of every basis vector, float32 (M, count)."""
        out = torch.empty(self.size, count)
        self.read_into(start, out)
        return out

    def combinations(self, weights: Tensor) -> Iterator[Tensor]:
        """As `VectorSet.combinations`, for the basis vectors; weights: (M, K)."""
        return combinations(self.blocks, self.count, weights)


def _read_index(store: Store, prefix: str) -> BasisMetadata:
    """The metadata of a basis. Raises as `StoredBasis`."""
    where = f"{store.where(prefix)}/{INDEX}"
    try:
        fields = json.loads(store.read(f"{prefix}/{INDEX}"))["metadata"]
        problem = format_problem(fields["raytvb"], where)
        if problem is not None:
            raise VectorError(problem.reason, problem.remedy)
        metadata = BasisMetadata.model_validate(fields)
        if metadata.size < 1:
            raise ValueError(f"{metadata.size} vectors")
    except VectorError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VectorError(f"{where} is not the index of a basis: {error!r}") from None
    return metadata


def _sorted_by_name(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shapes[name] for name in sorted(shapes)}
