"""Values that pass between the basis builder, the shards of coordinates and their callers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from torch import Tensor

from raytvb.errors import VectorError
from raytvb.experiment.stored_vectors import StoredVector
from raytvb.storage.basis_layout import Layout
from raytvb.storage.basis_writer import NO_TAGS
from raytvb.storage.records import FileInfo


@dataclass(frozen=True)
class VectorVersion:
    """A task's vector with certain contents. A vector that is made again is another version."""

    task: str
    url: str
    """URL of the store that has the vector."""
    key: str
    """Key of the vector file in that store."""
    file: FileInfo
    """The file as the vector's record describes it."""

    @property
    def checksum(self) -> str:
        """sha256 of the vector file."""
        return self.file.sha256

    @classmethod
    def of(cls, vector: StoredVector) -> VectorVersion:
        """The version of a stored vector, or of its twin."""
        return cls(vector.task, vector.store.url, vector.key, vector.file)


Versions: TypeAlias = Sequence[VectorVersion]

Outputs: TypeAlias = Sequence[tuple[str, Tensor]]
"""Folders, each with the weights (T, M) float64 of the basis to be written there."""

FilesByFolder: TypeAlias = dict[str, dict[str, FileInfo]]
"""The written files: for each folder, its files by name."""


@dataclass(frozen=True)
class CacheUse:
    """Where the shards keep the vectors' values."""

    kind: str = "memory"
    """Either `memory` or `disk`."""
    bytes: int = 0
    """Size of all values."""


@dataclass(frozen=True)
class BuilderStatus:
    """How far the basis builder has come."""

    vectors: int = 0
    """Number of vectors taken in."""
    floor: Mapping[int, float] = field(default_factory=dict)
    """The least relative error of any M vectors, by size M (only sizes below `vectors`)."""
    cache: CacheUse = CacheUse()
    failed: Mapping[str, str] = field(default_factory=dict)
    """By task, why the last call could not take in its vector, and what the user can do."""


@dataclass(frozen=True)
class WrittenBases:
    """What a call of `BasisBuilder.write_bases` has done."""

    names: tuple[str, ...] = ()
    """The bases that the call wrote; bases that existed before are left out."""
    notes: tuple[str, ...] = ()
    """What a user should know about these bases."""


class Shards(Protocol):
    """All coordinates: one `CoordinateShard`, or a group of actors with one shard each."""

    def fetch(self, versions: Versions) -> dict[str, VectorError]:
        """Take vectors in. Returns, by task, the error for each vector that cannot be used."""

    def rows(self, versions: Versions, new: int) -> Tensor:
        """Inner products by segment, see `CoordinateShard.rows`."""

    def atoms_gram(self, source: str | None, versions: Versions) -> Tensor:
        """Gram matrices by segment, see `CoordinateShard.atoms_gram`."""

    def write(
        self,
        outputs: Outputs,
        versions: Versions,
        source: str | None = None,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> FilesByFolder:
        """Write combinations, see `CoordinateShard.write`."""

    def cache(self) -> CacheUse:
        """Where the vectors' values are kept."""

    def layout(self, versions: Versions) -> Layout:
        """The coordinates, as the index of a basis describes them."""
