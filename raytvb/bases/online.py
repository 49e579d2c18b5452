"""An online basis in a store: M vectors that follow the tasks, each task vector seen once.

`maths.online_basis` advances the small matrices. The shards read and write the basis vectors S,
block by block. After every refit the state is stored: `online/<name>/` has the small matrices, and
S in a subfolder. The last S is `basis/<name>/`. Tasks are taken in the order of the experiment, not
in the order in which their fine-tunes end, so the result does not depend on which is faster. Only a
task that was missing in an earlier run comes after those that were taken in then.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from raytvb.bases.messages import Shards, VectorVersion, Versions
from raytvb.bases.shards import write_bases
from raytvb.experiment.basis_specs import BasisSpec
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import basis_identity, covers_other_tasks
from raytvb.experiment.layout import (
    basis_prefix,
    basis_vector_prefix,
    online_prefix,
    online_tables,
)
from raytvb.experiment.metrics import OnlineMetrics
from raytvb.maths import online_basis
from raytvb.maths.online_basis import OnlineState
from raytvb.storage import records
from raytvb.storage.damage import unreadable
from raytvb.storage.records import FileInfo, Record
from raytvb.storage.replacing import delete_thing
from raytvb.storage.store import Store
from raytvb.storage.tensor_file import tensor_of, tensors_of

TABLES = ("W", "H", "error", "norm")
"""The tensors of an `OnlineState`."""


def read_tables(store: Store, prefix: str, record: Record, count: int) -> dict[str, Tensor]:
    """The small matrices of an online basis after `count` tasks, see `OnlineState`.

    Raises DamagedError if they are missing, differ from the record, or do not fit each other.
    """
    name = online_tables(count)
    where = store.where(f"{prefix}/{name}")
    stored = tensors_of(records.read_file(store, prefix, name, record), where)
    tables: dict[str, Tensor] = {}
    for table, dimensions in (("W", 2), ("H", 2), ("error", 1), ("norm", 1)):
        tables[table] = tensor_of(stored, table, torch.float64, dimensions, where)
    for table, shape in (
        ("W", (len(tables["W"]), count)),
        ("H", (count, len(tables["W"]))),
        ("error", (count,)),
        ("norm", (count,)),
    ):
        if tuple(tables[table].shape) != shape:
            raise unreadable(where, f"{table} has the shape {tuple(tables[table].shape)}")
    return tables


class OnlineBasis:
    """One online basis of an experiment, restored from the store."""

    spec: BasisSpec
    seen: tuple[VectorVersion, ...]
    """The vectors taken in so far, in that order."""
    folder: str | None
    """The folder of S in the store; None before the first vector."""
    written: dict[str, FileInfo]
    """The files of S."""
    state: OnlineState

    def __init__(
        self, experiment: Experiment, store: Store, shards: Shards, spec: BasisSpec
    ) -> None:
        """Goes on from the state in the store.

        Raises UserError if that state belongs to another experiment.
        """
        self.spec = spec
        self._experiment, self._store, self._shards = experiment, store, shards
        self._prefix = online_prefix(spec.name)
        self._identity = basis_identity(experiment, spec)
        self._replaced = set[str]()
        """Stored files of a state that was given up, which the next state replaces."""
        record = records.find(store, self._prefix)
        if record is None:
            self._start()
        else:
            self._check(record)
            count = len(self._metrics(record).tasks)
            self._continue(record, read_tables(store, self._prefix, record, count))

    def _check(self, record: Record) -> None:
        """Raise UserError unless the state is one of this experiment, with any of its tasks."""
        missing = self._experiment.missing
        if not covers_other_tasks(record.identity, self._identity, missing):
            records.check_identity(self._store, self._prefix, record, self._identity)

    def _start(self) -> None:
        """The state before the first task."""
        self.seen, self.folder, self.written = (), None, {}
        self._files: dict[str, FileInfo] = {}
        self.state = online_basis.start(self.spec.method, self.spec.size)

    def _continue(self, record: Record, tables: Mapping[str, Tensor]) -> None:
        """The state that a record and its latest tables describe."""
        metrics = self._metrics(record)
        where = self._store.where(self._prefix)
        self.seen = tuple(VectorVersion(t, record.parent(t, where)) for t in metrics.tasks)
        self.folder, self.written = metrics.folder, metrics.written
        self._files = record.files
        # Products must not depend on the address of a table. The copies begin at multiples of 64
        # bytes, whether the tables were read or just computed.
        copies = {name: tables[name].contiguous().clone() for name in TABLES}
        self.state = OnlineState(self.spec.method, self.spec.size, **copies)

    def _metrics(self, record: Record) -> OnlineMetrics:
        return record.metrics_as(OnlineMetrics, self._store.where(self._prefix))

    def follow(self, checksums: Mapping[str, str]) -> None:
        """Take in the available tasks, in the order of the experiment.

        A vector cannot be taken out of the basis again. So the basis starts anew if one of its
        vectors was made again or cannot be used any more, or if its files were deleted. In the
        first case the last basis stays as it is until the new one is complete.

        checksums: by task, the checksums of the available vectors.
        """
        if self._is_gone():
            # Nothing can be read from a basis without some of its files.
            delete_thing(self._store, self._prefix)
            delete_thing(self._store, basis_prefix(self.spec.name))
            self._replaced = set()
            self._start()
        elif self._is_outdated(checksums):
            self._replaced |= self._files.keys()
            self._start()
        while (batch := self._next_batch(checksums)) is not None:
            self._take_in(batch)

    def is_stored(self, record: Record) -> bool:
        """Whether the record of a basis is that of the vectors taken in so far."""
        parents: dict[str, str] = {}
        for version in self.seen:
            parents[basis_vector_prefix(self._experiment, version.task)] = version.checksum
        return parents == record.parents

    def _is_gone(self) -> bool:
        """Whether files of S were deleted."""
        if not self.written:
            return False
        keys = self._store.keys(str(self.folder))
        return not {f"{self.folder}/{name}" for name in self.written} <= set(keys)

    def _is_outdated(self, checksums: Mapping[str, str]) -> bool:
        """Whether a vector was made again, or left out, after it had been taken in."""
        for version in self.seen:
            if version.task in self._experiment.missing:
                return True
            if checksums.get(version.task, version.checksum) != version.checksum:
                return True
        return False

    def _next_batch(self, checksums: Mapping[str, str]) -> list[VectorVersion] | None:
        """The next `basis.buffer` vectors (fewer at the end); None until all are available."""
        seen = {version.task for version in self.seen}
        rest = [task for task in self._experiment.task_names if task not in seen]
        tasks = rest[: self._experiment.basis.buffer]
        if not tasks or not all(task in checksums for task in tasks):
            return None
        return [VectorVersion(task, checksums[task]) for task in tasks]

    def _take_in(self, batch: Versions) -> None:
        """Refit the basis to include a batch of vectors, and store it with its state."""
        gram = self._shards.atoms_gram(self.folder, batch).sum(dim=0)
        mix, state = online_basis.advance(self.state, gram)
        seen = [*self.seen, *batch]
        is_last = len(seen) == len(self._experiment.tasks)
        step = f"{len(seen):06d}"
        basis = basis_prefix(self.spec.name)
        # A basis of fewer tasks stays as it is until this one is committed in its place.
        in_basis = is_last and records.find(self._store, basis) is None
        folder = basis if in_basis else f"{self._prefix}/{step}"
        written = write_bases(self._store, self._shards, {folder: mix}, batch, self.folder)[folder]
        files = self._kept_tables()
        if not in_basis:
            files |= {f"{step}/{name}": info for name, info in written.items()}
        tables = {name: getattr(state, name).contiguous().clone() for name in TABLES}
        record = records.commit(
            self._store,
            self._prefix,
            identity=self._identity,
            parents={version.task: version.checksum for version in seen},
            written=files,
            files={online_tables(len(seen)): save(tables)},
            metrics=OnlineMetrics(
                tasks=tuple(version.task for version in seen), folder=folder, written=written
            ),
        )
        outdated = (self._files.keys() | self._replaced) - record.files.keys()
        self._continue(record, tables)
        self._replaced = set()
        for name in outdated:
            self._store.delete(f"{self._prefix}/{name}")

    def _kept_tables(self) -> dict[str, FileInfo]:
        """The stored tables of earlier states that an evaluation will read."""
        experiment = self._experiment
        stored = [n for n in range(1, len(self.seen) + 1) if online_tables(n) in self._files]
        total, buffer = len(experiment.tasks), experiment.basis.buffer
        names = [online_tables(n) for n in online_basis.stored_arrivals(stored, total, buffer)]
        return {name: self._files[name] for name in names}

    def tables(self) -> tuple[Tensor, Tensor]:
        """H (T, M) and W (M, T), with the tasks in the order of the experiment."""
        seen = [version.task for version in self.seen]
        order = [seen.index(task) for task in self._experiment.task_names]
        return self.state.H[order], self.state.W[:, order]

    def write(self) -> dict[str, FileInfo]:
        """The files of S in the folder of the basis. They are copied there if they are not yet."""
        folder = basis_prefix(self.spec.name)
        if self.folder != folder:
            size = self.state.H.shape[1]
            # [S N] @ weights is S: the vector has the weight 0, and only tells the coordinates.
            weights = torch.eye(size + 1, size, dtype=torch.float64)
            outputs = {folder: weights}
            files = write_bases(self._store, self._shards, outputs, self.seen[:1], self.folder)
            return files[folder]
        return self.written

    def error_bounds(self) -> dict[str, float]:
        """Upper bound of the relative error (a norm, not squared) of each task taken in so far."""
        bounds: list[float] = online_basis.relative_bounds(self.state).tolist()
        return {version.task: bound for version, bound in zip(self.seen, bounds, strict=True)}
