"""An online basis in a store: M vectors that follow the tasks, each task vector seen once.

`maths.online_basis` advances the small matrices. The shards read and write the basis vectors S,
block by block. After every refit the state is stored: `online/<name>/` has the small matrices, and
S in a subfolder. The last S is `basis/<name>/`. Tasks are taken in the order of the experiment, not
in the order in which their fine-tunes end, so the result does not depend on which is faster. Only
tasks that came later, in another run, come after those that were taken in before.

Tasks are taken in by batches of `basis.buffer`. If the last batch is not full, the state before it
is kept, and the tasks that come next fill it. So a basis does not depend on how many runs it grew
in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from raytvb.bases.messages import Shards, VectorVersion, Versions
from raytvb.bases.shards import write_bases
from raytvb.experiment.basis_specs import BasisSpec
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import basis_identity, basis_settings
from raytvb.experiment.layout import (
    basis_prefix,
    find_online_tables,
    online_prefix,
    online_tables,
)
from raytvb.experiment.metrics import ErrorBounds, OnlineMetrics, WholeBatches
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
    name = find_online_tables(record.files, count) or online_tables(count)
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
    seen: tuple[tuple[str, str], ...]
    """The tasks taken in so far, in that order, with the checksums of their vectors."""
    folder: str | None
    """The folder of S in the store; None before the first vector."""
    written: dict[str, FileInfo]
    """The files of S."""
    state: OnlineState

    def __init__(
        self, experiment: Experiment, store: Store, shards: Shards, spec: BasisSpec
    ) -> None:
        """Goes on from the state in the store, or starts anew if that was made in another way."""
        self.spec = spec
        self._experiment, self._store, self._shards = experiment, store, shards
        self._prefix = online_prefix(spec.name)
        self._identity = basis_identity(experiment, spec)
        self._available: Mapping[str, VectorVersion] = {}
        self._replaced = set[str]()
        """Stored files of a state that was given up, which the next state replaces."""
        record = records.find(store, self._prefix)
        if record is not None and basis_settings(record.identity) == self._identity:
            count = len(self._metrics(record).tasks)
            self._continue(record, read_tables(store, self._prefix, record, count))
        else:
            self._start()
            self._replaced = set() if record is None else set(record.files)

    def _start(self) -> None:
        """The state before the first task."""
        self.seen, self.folder, self.written = (), None, {}
        self._files: dict[str, FileInfo] = {}
        self._bounds: tuple[ErrorBounds, ...] = ()
        self._whole: WholeBatches | None = None
        self.state = online_basis.start(self.spec.method, self.spec.size)

    def _continue(self, record: Record, tables: Mapping[str, Tensor]) -> None:
        """The state that a record and its latest tables describe."""
        metrics = self._metrics(record)
        where = self._store.where(self._prefix)
        self.seen = tuple((task, record.parent(task, where)) for task in metrics.tasks)
        self.folder, self.written = metrics.folder, metrics.written
        self._files, self._bounds, self._whole = record.files, metrics.bounds, metrics.whole
        self._set_state(tables)

    def _set_state(self, tables: Mapping[str, Tensor]) -> None:
        # Products must not depend on the address of a table. The copies begin at multiples of 64
        # bytes, whether the tables were read or just computed.
        copies = {name: tables[name].contiguous().clone() for name in TABLES}
        self.state = OnlineState(self.spec.method, self.spec.size, **copies)

    def _metrics(self, record: Record) -> OnlineMetrics:
        return record.metrics_as(OnlineMetrics, self._store.where(self._prefix))

    def follow(self, available: Mapping[str, VectorVersion]) -> None:
        """Take in the available vectors, in the order of the experiment.

        A vector cannot be taken out of the basis again. So the basis starts anew if one of its
        vectors was made again or is no longer used, or if its files were deleted. In the first case
        the last basis stays as it is until the new one is complete.

        available: by task.
        """
        self._available = available
        if self._is_gone():
            # Nothing can be read from a basis without some of its files.
            delete_thing(self._store, self._prefix)
            delete_thing(self._store, basis_prefix(self.spec.name))
            self._replaced = set()
            self._start()
        elif self._is_outdated():
            self._replaced |= self._files.keys()
            self._start()
        while (batch := self._next_batch()) is not None:
            if self._whole is not None:
                self._step_back(self._whole)
            self._take_in(batch)

    def _is_gone(self) -> bool:
        """Whether files of S were deleted."""
        folders = {self.folder: self.written}
        if self._whole is not None:
            folders[self._whole.folder] = self._whole.written
        for folder, written in folders.items():
            keys = self._store.keys(str(folder)) if written else []
            if not {f"{folder}/{name}" for name in written} <= set(keys):
                return True
        return False

    def _is_outdated(self) -> bool:
        """Whether a vector was made again, or is no longer used, after it had been taken in."""
        for task, checksum in self.seen:
            if task not in self._experiment.task_names:
                return True
            if task in self._available and self._available[task].checksum != checksum:
                return True
        return False

    def _next_batch(self) -> list[VectorVersion] | None:
        """The next `basis.buffer` vectors (fewer at the end); None until all are available.

        The vectors of a last batch that was not full are among them.
        """
        names, seen = self._experiment.task_names, [task for task, _ in self.seen]
        if len(seen) == len(names):
            return None
        in_whole = len(seen) if self._whole is None else self._whole.tasks
        rest = [*seen[in_whole:], *(task for task in names if task not in seen)]
        tasks = rest[: self._experiment.basis.buffer]
        if not all(task in self._available for task in tasks):
            return None
        return [self._available[task] for task in tasks]

    def _step_back(self, whole: WholeBatches) -> None:
        """Return to the state before a last batch that was not full."""
        self._replaced |= self._files.keys() - self._files_of(whole.folder, whole.written).keys()
        self.seen = self.seen[: whole.tasks]
        self.folder, self.written, self._whole = whole.folder, whole.written, None
        self._bounds = tuple(b for b in self._bounds if b.tasks <= whole.tasks)
        if not whole.tasks:
            self.state = online_basis.start(self.spec.method, self.spec.size)
            return
        record = records.read_record(self._store, records.record_key(self._prefix))
        self._set_state(read_tables(self._store, self._prefix, record, whole.tasks))

    def _files_of(self, folder: str | None, written: Mapping[str, FileInfo]) -> dict[str, FileInfo]:
        """The files of S by their names below the folder of the state, if they lie there."""
        if folder is None or not folder.startswith(f"{self._prefix}/"):
            return {}
        step = folder.removeprefix(f"{self._prefix}/")
        return {f"{step}/{name}": info for name, info in written.items()}

    def _take_in(self, batch: Versions) -> None:
        """Refit the basis to include a batch of vectors, and store it with its state."""
        gram = self._shards.atoms_gram(self.folder, batch).sum(dim=0)
        mix, state = online_basis.advance(self.state, gram)
        seen = [*self.seen, *((version.task, version.checksum) for version in batch)]
        version = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:8]
        folder = self._folder_after(len(seen), version)
        written = write_bases(self._store, self._shards, {folder: mix}, batch, self.folder)[folder]
        whole = None
        if len(batch) < self._experiment.basis.buffer:
            whole = WholeBatches(tasks=len(self.seen), folder=self.folder, written=self.written)
        files = self._kept_tables(whole) | self._files_of(folder, written)
        if whole is not None:
            files |= self._files_of(whole.folder, whole.written)
        tables = {name: getattr(state, name).contiguous().clone() for name in TABLES}
        record = records.commit(
            self._store,
            self._prefix,
            identity=self._identity,
            parents=dict(seen),
            written=files,
            files={online_tables(len(seen), version): save(tables)},
            metrics=OnlineMetrics(
                tasks=tuple(task for task, _ in seen),
                folder=folder,
                written=written,
                bounds=(*self._bounds, _bounds_of(state)),
                whole=whole,
            ),
        )
        outdated = (self._files.keys() | self._replaced) - record.files.keys()
        self._continue(record, tables)
        self._replaced = set()
        for name in outdated:
            self._store.delete(f"{self._prefix}/{name}")

    def _folder_after(self, count: int, version: str) -> str:
        """Where S goes after some tasks: a folder that no other tasks have.

        The S of all tasks goes where the basis is, unless there is a basis, which stays as it is
        until this one is committed in its place.
        """
        basis, buffer = basis_prefix(self.spec.name), self._experiment.basis.buffer
        is_last = count == len(self._experiment.tasks)
        if is_last and buffer == 1 and records.find(self._store, basis) is None:
            return basis
        return f"{self._prefix}/{count:06d}-{version}"

    def _kept_tables(self, whole: WholeBatches | None) -> dict[str, FileInfo]:
        """The stored tables of earlier states that an evaluation or a later batch will read."""
        experiment = self._experiment
        names = {n: find_online_tables(self._files, n) for n in range(1, len(self.seen) + 1)}
        stored = [n for n, name in names.items() if name is not None]
        total, buffer = len(experiment.tasks), experiment.basis.buffer
        numbers = set(online_basis.stored_arrivals(stored, total, buffer))
        if whole is not None and whole.tasks:
            numbers.add(whole.tasks)
        return {str(names[n]): self._files[str(names[n])] for n in sorted(numbers)}

    def tables(self) -> tuple[Tensor, Tensor]:
        """H (T, M) and W (M, T), with the tasks in the order of the experiment."""
        seen = [task for task, _ in self.seen]
        order = [seen.index(task) for task in self._experiment.task_names]
        return self.state.H[order], self.state.W[:, order]

    def write(self) -> dict[str, FileInfo]:
        """The files of S in the folder of the basis. They are copied there if they are not yet."""
        folder = basis_prefix(self.spec.name)
        if self.folder != folder:
            size = self.state.H.shape[1]
            # [S N] @ weights is S: the vector has the weight 0, and only tells the coordinates.
            weights = torch.eye(size + 1, size, dtype=torch.float64)
            outputs, first = {folder: weights}, [self._available[self.seen[0][0]]]
            files = write_bases(self._store, self._shards, outputs, first, self.folder)
            return files[folder]
        return self.written

    def error_bounds(self) -> dict[str, float]:
        """Upper bound of the relative error (a norm, not squared) of each task taken in so far."""
        bounds: list[float] = online_basis.relative_bounds(self.state).tolist()
        return {task: bound for (task, _), bound in zip(self.seen, bounds, strict=True)}


def _bounds_of(state: OnlineState) -> ErrorBounds:
    bounds = online_basis.relative_bounds(state)
    return ErrorBounds(tasks=len(bounds), mean=float(bounds.mean()), largest=float(bounds.max()))
