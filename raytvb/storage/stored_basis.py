"""Bases read in pieces."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from os import PathLike, fspath

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.storage.basis_layout import INDEX, Layout, file_columns, file_names, pieces_of
from raytvb.storage.masks import MaskFile
from raytvb.storage.store import Store
from raytvb.storage.vector_set import combinations


class StoredBasis:
    """A basis in a store, read file by file."""

    def __init__(self, store: Store | str | PathLike[str], prefix: str) -> None:
        """Reads the index (and the mask's header). Raises VectorError where they are not those of a
        basis.

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
            key = (
                posixpath.normpath(posixpath.join(prefix, info["mask"])) if "mask" in info else None
            )
            self.layout = Layout(
                info["base"], self.parameters, shapes, key, info.get("mask_fingerprint")
            )
            if self.size < 1:
                raise ValueError(f"{self.size} vectors")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise VectorError(
                f"{store.where(prefix)}/{INDEX} is not the index of a basis: {error!r}"
            ) from None
        self.mask = None if key is None else MaskFile(store, key)
        if self.mask is not None and self.mask.fingerprint != self.layout.mask:
            raise VectorError(
                f"{store.where(prefix)} was made with another mask than {store.where(str(key))}"
            )
        self.count = self.layout.count
        self._held: tuple[int, Tensor] | None = None

    @property
    def files(self) -> list[str]:
        """Keys of its files, in the order of their coordinates."""
        return [f"{self.prefix}/{name}" for name in file_names(self.size, self.count)]

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Consecutive (start, rows (M, n) float32), a file at a time; `start` and `stop` are where
        files begin or end.

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
                parts = [
                    tensors[name].reshape(self.size, count)
                    for name, count, _ in pieces_of(self.layout.shapes, first, last)
                ]
            except (SafetensorError, KeyError, RuntimeError) as error:
                raise VectorError(f"{self.store.where(key)} is damaged: {error!r}") from None
            yield first, torch.cat(parts, dim=1)

    def read_into(self, start: int, out: Tensor) -> None:
        """Coordinates from `start` on of all vectors into `out` (M, n); the last file is kept for
        the next call.
        """
        columns, done = file_columns(self.size), 0
        if not 0 <= start <= self.count - out.shape[1]:
            raise ValueError(
                f"{self.prefix} has {self.count} coordinates; {start}..{start + out.shape[1]} asked for"
            )
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
        """As `VectorSet.combinations`, of the basis vectors: weights (M, K)."""
        return combinations(self.blocks, self.count, weights)
