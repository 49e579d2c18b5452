"""Stored bases, read file by file."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from os import PathLike, fspath

import torch
from pydantic import ValidationError
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.storage.basis_layout import (
    INDEX,
    INDEX_ENDING,
    BasisMetadata,
    Layout,
    file_columns,
    file_names,
    pieces_of,
    tag_of,
)
from raytvb.storage.checked_file import CheckedFile, recorded_files
from raytvb.storage.contract import Contract, parse_json, problem_of
from raytvb.storage.damage import differs, unreadable
from raytvb.storage.format_version import format_problem
from raytvb.storage.masks import MaskFile
from raytvb.storage.records import FileInfo
from raytvb.storage.store import Store
from raytvb.storage.tensor_file import tensor_of, tensors_of
from raytvb.storage.vector_set import combinations
from raytvb.storage.vectors import mask_key_below


class StoredBasis:
    """A basis in a store, read file by file."""

    def __init__(
        self,
        store: Store | str | PathLike[str],
        prefix: str,
        recorded: Mapping[str, FileInfo] | None = None,
    ) -> None:
        """Reads the index (and the mask's header).

        store: the store or its URL. prefix: the folder of the basis in the store. recorded: the
        files that its record lists, for a caller that has read the record. Raises
        VectorError for a folder without a basis index, a basis of a newer raytvb, and a mask that
        does not match the basis; StoreKeyError if the index is missing; DamagedError for files that
        are not as the record of the basis says.
        """
        store = store if isinstance(store, Store) else Store(fspath(store))
        self.store, self.prefix = store, prefix
        self._recorded = recorded_files(store, prefix) if recorded is None else recorded
        """The files as recorded; None for a folder that was copied without its record."""
        self.index_key = f"{prefix}/{_index_name(self._recorded)}"
        """Key of the index."""
        index = _read_index(self._file(self.index_key))
        metadata = index.metadata
        self.size = metadata.size
        self.parameters = _sorted_by_name(metadata.parameters)
        info = metadata.raytvb
        mask_key = None
        if info.mask is not None:
            where = store.where(self.index_key)
            mask_key = mask_key_below(store, prefix, info.mask, where)
        shapes = _sorted_by_name(metadata.shapes)
        self.layout = Layout(info.base, self.parameters, shapes, mask_key, info.mask_fingerprint)
        self.mask = None if mask_key is None else MaskFile(store, mask_key)
        self.count = self.layout.count
        if self.mask is not None and not self._is_of(self.mask):
            raise VectorError(
                f"{store.where(prefix)} was made with another mask than "
                f"{store.where(str(mask_key))}"
            )
        self._names = self._checked_names(index)
        self._held: tuple[int, Tensor] | None = None

    def _is_of(self, mask: MaskFile) -> bool:
        """Whether the basis vectors can be the entries that a mask keeps."""
        same = mask.fingerprint == self.layout.mask and mask.kept == self.count
        return same and mask.shapes == self.parameters

    def _checked_names(self, index: _Index) -> list[str]:
        """The names of the tensor files. Raises VectorError for other names than they can have."""
        names, where = sorted(set(index.weight_map.values())), self.store.where(self.index_key)
        # The number alone comes first: an index that lies may describe any number of files.
        expected = -(-self.count // file_columns(self.size))
        if len(names) != expected:
            raise VectorError(f"{where} names {len(names)} files instead of {expected}")
        tag = tag_of([posixpath.basename(self.index_key)])
        if names and names != file_names(self.size, self.count, tag):
            raise VectorError(f"{where} names files that are none of this basis, as {names[0]:.80}")
        return names

    @property
    def files(self) -> list[str]:
        """Keys of the basis's tensor files, in the order of their coordinates."""
        return [f"{self.prefix}/{name}" for name in self._names]

    def _file(self, key: str) -> CheckedFile:
        """A file of the basis, which is compared with the record while it is read."""
        if self._recorded is None:
            return CheckedFile(self.store, key, None)
        name = key.rpartition("/")[2]
        if name not in self._recorded:
            raise differs(self.store.where(key), self.store.url, "it is not in the record")
        return CheckedFile(self.store, key, self._recorded[name])

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Consecutive (start, rows (M, n) float32), one file at a time.

        `start` and `stop` (default: the end) must be where files begin or end. Raises VectorError
        that names a file whose contents do not match the index, and DamagedError for a file that is
        missing or differs from the record.
        """
        columns = file_columns(self.size)
        stop = self.count if stop is None else stop
        for first in range(start, stop, columns):
            last = min(first + columns, self.count)
            key = self.files[first // columns]
            yield first, self._rows(key, first, last)

    def _rows(self, key: str, first: int, last: int) -> Tensor:
        """The values of one file, which has the coordinates first..last: (M, last - first)."""
        where = self.store.where(key)
        tensors = tensors_of(self._file(key).read(), where)
        parts: list[Tensor] = []
        for piece in pieces_of(self.layout.shapes, first, last):
            shape = (self.size, *piece.shape)
            tensor = tensor_of(tensors, piece.tensor, torch.float32, len(shape), where)
            if tuple(tensor.shape) != shape:
                raise unreadable(where, f"{piece.tensor} has the shape {tuple(tensor.shape)}")
            parts.append(tensor.reshape(self.size, piece.count))
        return torch.cat(parts, dim=1)

    def read_into(self, start: int, out: Tensor) -> None:
        """Read coordinates from `start` on of all basis vectors into `out` (M, n) float32.

        The last file is kept in memory for the next call. Raises ValueError for coordinates that
        the basis does not have, and VectorError as `blocks`.
        """
        done = 0
        if not 0 <= start <= self.count - out.shape[1]:
            stop = start + out.shape[1]
            raise ValueError(f"{self.prefix} has {self.count} coordinates, not {start}..{stop}")
        while done < out.shape[1]:
            first, rows = self._hold(start + done)
            part = rows[:, start + done - first : start + out.shape[1] - first]
            out[:, done : done + part.shape[1]] = part
            done += part.shape[1]

    def _hold(self, start: int) -> tuple[int, Tensor]:
        """The file with coordinate `start`: where it begins, and its rows (M, n)."""
        columns = file_columns(self.size)
        first = start // columns * columns
        if self._held is None or self._held[0] != first:
            self._held = next(self.blocks(first))
        return self._held

    def read_all(self, start: int, count: int) -> Tensor:
        """Coordinates start..start + count of every basis vector, float32 (M, count).

        Raises as `read_into`.
        """
        if count and start in range(self.count):
            self._hold(start)  # an index that lies is noticed before memory is taken
        out = torch.empty(self.size, count)
        self.read_into(start, out)
        return out

    def combinations(self, weights: Tensor) -> Iterator[Tensor]:
        """As `VectorSet.combinations`, for the basis vectors; weights: (M, K)."""
        return combinations(self.blocks, self.count, weights)


class _Index(Contract):
    """The index file of a basis."""

    metadata: BasisMetadata
    weight_map: dict[str, str]
    """Names of the files, by tensor."""


def _index_name(recorded: Mapping[str, FileInfo] | None) -> str:
    """The name of the index, by which a basis that was written again finds its new files."""
    for name in recorded or ():
        if name.endswith(INDEX_ENDING):
            return name
    return INDEX


def _read_index(file: CheckedFile) -> _Index:
    """The index of a basis. Raises as `StoredBasis`."""
    fields = parse_json(file.read(), file.where)
    try:
        problem = format_problem(fields["metadata"]["raytvb"], file.where)
        if problem is not None:
            raise VectorError(problem.reason, problem.remedy)
        index = _Index.model_validate(fields)
        if index.metadata.size < 1:
            raise ValueError(f"{index.metadata.size} vectors")
    except ValidationError as error:
        raise VectorError(
            f"{file.where} is not the index of a basis: {problem_of(error)}"
        ) from None
    except VectorError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VectorError(f"{file.where} is not the index of a basis: {error!r}") from None
    return index


def _sorted_by_name(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shapes[name] for name in sorted(shapes)}
