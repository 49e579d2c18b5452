"""What passes between the basis builder, the shards of coordinates and whoever feeds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from torch import Tensor

from raytvb.errors import VectorError
from raytvb.experiment.layout import VECTOR
from raytvb.storage.basis_layout import Layout
from raytvb.storage.records import FileInfo, Record


@dataclass(frozen=True)
class VectorVersion:
    """A task's vector with certain contents: one that is made again is another version."""

    task: str
    checksum: str
    """sha256 of the vector file."""
    file: FileInfo | None = None
    """The file as its record describes it; None where the record has to be read for that."""

    @classmethod
    def of(cls, task: str, record: Record) -> VectorVersion:
        """The version that the record of a vector, or of its twin, describes."""
        file = record.files[VECTOR]
        return cls(task, file.sha256, file)


Versions: TypeAlias = Sequence[VectorVersion]

Outputs: TypeAlias = Sequence[tuple[str, Tensor]]
"""Folders, each with the weights (T, M) float64 of the basis to be written there."""

FilesByFolder: TypeAlias = dict[str, dict[str, FileInfo]]
"""What was written: files by name, by folder."""


@dataclass(frozen=True)
class CacheUse:
    """Where the shards keep the vectors' values."""

    kind: str = "memory"
    """memory or disk."""
    bytes: int = 0


@dataclass(frozen=True)
class BuilderStatus:
    """How far the basis builder has come."""

    vectors: int = 0
    """Number of vectors taken in."""
    floor: Mapping[int, float] = field(default_factory=dict)
    """By basis size M below the number of vectors: the least relative error of any M vectors."""
    cache: CacheUse = CacheUse()
    failed: Mapping[str, str] = field(default_factory=dict)
    """By task, why its vector could not be taken in by the last call, and the way out."""


@dataclass(frozen=True)
class WrittenBases:
    """What a call to write bases has done."""

    names: tuple[str, ...] = ()
    """The bases that were written; those that were there already are left out."""
    notes: tuple[str, ...] = ()
    """What a user should know of them."""


class Shards(Protocol):
    """All coordinates: one `CoordinateShard`, or a group of actors with one each."""

    def fetch(self, versions: Versions) -> dict[str, VectorError]:
        """Take vectors in; by task, the error of each that cannot be used."""

    def rows(self, versions: Versions, new: int) -> Tensor:
        """Inner products by segment, see `CoordinateShard.rows`."""

    def atoms_gram(self, source: str | None, versions: Versions) -> Tensor:
        """Gram matrices by segment, see `CoordinateShard.atoms_gram`."""

    def write(
        self, outputs: Outputs, versions: Versions, source: str | None = None
    ) -> FilesByFolder:
        """Write combinations, see `CoordinateShard.write`."""

    def cache(self) -> CacheUse:
        """Where the vectors' values are kept."""

    def layout(self, versions: Versions) -> Layout:
        """The coordinates, as the index of a basis describes them."""
