"""An online basis in a store: M vectors that follow the tasks, each task vector seen once.

`maths.online_basis` advances the small matrices. The shards read and write the basis vectors S,
block by block. After every refit the state is stored: `online/<name>/` has the small matrices, and
S in a subfolder. The last S is `basis/<name>/`. Tasks are taken in the order of the experiment, not
in the order in which their fine-tunes end, so the result does not depend on which is faster.
"""

from __future__ import annotations

from collections.abc import Mapping

from safetensors.torch import load, save
from torch import Tensor

from raytvb.bases.messages import Shards, VectorVersion, Versions
from raytvb.bases.shards import write_bases
from raytvb.experiment.basis_specs import BasisSpec
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import basis_identity
from raytvb.experiment.layout import basis_prefix, online_prefix, online_tables
from raytvb.experiment.metrics import OnlineMetrics
from raytvb.maths import online_basis
from raytvb.maths.online_basis import OnlineState
from raytvb.storage import records
from raytvb.storage.records import FileInfo, Record
from raytvb.storage.store import Store

TABLES = ("W", "H", "error", "norm")
"""The tensors of an `OnlineState`."""


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
        record = records.find(store, self._prefix, self._identity)
        if record is None:
            self._start()
        else:
            count = len(self._metrics(record).tasks)
            tables = load(store.read(f"{self._prefix}/{online_tables(count)}"))
            self._continue(record, tables)

    def _start(self) -> None:
        """The state before the first task."""
        self.seen, self.folder, self.written = (), None, {}
        self._files: dict[str, FileInfo] = {}
        self.state = online_basis.start(self.spec.method, self.spec.size)

    def _continue(self, record: Record, tables: Mapping[str, Tensor]) -> None:
        """The state that a record and its latest tables describe."""
        metrics = self._metrics(record)
        self.seen = tuple(VectorVersion(task, record.parents[task]) for task in metrics.tasks)
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
        vectors was made again, or if its files were deleted.

        checksums: by task, the checksums of the available vectors.
        """
        if self._is_gone() or self._is_outdated(checksums):
            self._store.delete(self._prefix)
            self._store.delete(basis_prefix(self.spec.name))
            self._start()
        while (batch := self._next_batch(checksums)) is not None:
            self._take_in(batch)

    def _is_gone(self) -> bool:
        """Whether files of S were deleted."""
        if not self.written:
            return False
        keys = self._store.keys(str(self.folder))
        return not {f"{self.folder}/{name}" for name in self.written} <= set(keys)

    def _is_outdated(self, checksums: Mapping[str, str]) -> bool:
        """Whether a vector was made again after it had been taken in."""
        return any(checksums.get(v.task, v.checksum) != v.checksum for v in self.seen)

    def _next_batch(self, checksums: Mapping[str, str]) -> list[VectorVersion] | None:
        """The next `basis.buffer` vectors (fewer at the end); None until all are available."""
        start = len(self.seen)
        tasks = self._experiment.task_names[start : start + self._experiment.basis.buffer]
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
        folder = basis_prefix(self.spec.name) if is_last else f"{self._prefix}/{step}"
        written = write_bases(self._store, self._shards, {folder: mix}, batch, self.folder)[folder]
        files = self._kept_tables()
        if not is_last:
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
        outdated = self._files.keys() - record.files.keys()
        self._continue(record, tables)
        for name in outdated:
            self._store.delete(f"{self._prefix}/{name}")

    def _kept_tables(self) -> dict[str, FileInfo]:
        """The stored tables of earlier states that an evaluation will read."""
        experiment = self._experiment
        looks = online_basis.arrivals(len(experiment.tasks), experiment.basis.buffer)
        kept = {online_tables(count) for count in looks}
        return {name: info for name, info in self._files.items() if name in kept}

    def error_bounds(self) -> dict[str, float]:
        """Upper bound of the relative error (a norm, not squared) of each task taken in so far."""
        bounds: list[float] = online_basis.relative_bounds(self.state).tolist()
        return {version.task: bound for version, bound in zip(self.seen, bounds, strict=True)}
