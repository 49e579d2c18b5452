"""The stream from task vectors to bases: each vector is taken in once it is committed.

How the room works, in reading order: `BasisBuilder` in this module keeps the exact Gram matrix of
all vectors and fits bases to it, which needs only T x T numbers. `shards` does all work on arrays
as long as a vector. `online` has the bases that follow the tasks one by one. `messages` has the
values that these modules pass to each other. `spectrum` shows what a basis of any size would lose.

The builder is a plain class; `orchestration` wraps it as a Ray actor. Its state is in the store
(see `storage.gram_state`). So a restarted actor goes on where it was, a repeated call changes
nothing, and of two actors only the later one writes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from raytvb.bases.messages import BuilderStatus, Shards, VectorVersion, WrittenBases
from raytvb.bases.online import OnlineBasis
from raytvb.bases.shards import CoordinateShard, write_bases
from raytvb.errors import VectorError
from raytvb.experiment.basis_specs import BasisSpec, basis_specs, sizes_of
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import (
    basis_identity,
    covers_other_tasks,
    find_of_these_tasks,
)
from raytvb.experiment.layout import (
    BASES,
    COEFFICIENTS,
    ONLINE,
    basis_prefix,
    basis_vector_prefix,
)
from raytvb.experiment.metrics import BasisMetrics
from raytvb.experiment.stored import write_coefficients
from raytvb.experiment.task_store import task_stores
from raytvb.maths.basis_fit import BasisFit, fit_bases, relative_loss
from raytvb.maths.gram_blocks import grown
from raytvb.models.worker_process import worker_setup
from raytvb.storage import records
from raytvb.storage.basis_layout import tag_of
from raytvb.storage.gram_rows import Arrival
from raytvb.storage.gram_state import GramState, GramWriter
from raytvb.storage.records import FileInfo
from raytvb.storage.replacing import commit_over, delete_thing, tagged
from raytvb.storage.store import Store
from raytvb.storage.vectors import VectorFile

REMEDY = "delete its folder in the store and run again to make it anew"
"""What a user can do about a stored vector that cannot be used, if its error does not say so."""


class BasisBuilder:
    """Streams the vectors of one experiment into its Gram matrix, and writes the bases."""

    def __init__(self, experiment: Experiment, shards: Shards | None = None) -> None:
        """Reads the state in the store. The first change takes the right to write it.

        shards: by default one shard in this process.
        """
        worker_setup()
        experiment.resources.apply_to_storage()
        self._experiment, self._store = experiment, Store(experiment.store)
        self._tasks = task_stores(experiment)
        self._shards = shards if shards is not None else CoordinateShard(experiment)
        self._state = GramState.undamaged(self._store)
        self._claimed: GramWriter | None = None
        self._online = self._online_bases()

    def _online_bases(self) -> list[OnlineBasis]:
        """The online bases of the experiment, as they are in the store."""
        bases: list[OnlineBasis] = []
        for spec in basis_specs(self._experiment):
            if spec.online:
                bases.append(OnlineBasis(self._experiment, self._store, self._shards, spec))
        return bases

    @property
    def _writer(self) -> GramWriter:
        """The right to write, taken at first use.

        After that, a builder that had the right before can no longer write.
        """
        if self._claimed is None:
            self._claimed = GramWriter(self._store)
            self._state = GramState.undamaged(self._store)  # as the builder before this one left it
        return self._claimed

    def status(self) -> BuilderStatus:
        """How far this builder has come."""
        history = self._state.history
        floor = history[-1].floor if history else {}
        return BuilderStatus(len(self._state.tasks), floor, self._shards.cache())

    def gram(self) -> Tensor:
        """The Gram matrix (T, T) float64 in the order of the experiment's tasks.

        Raises ValueError that names the vectors which have not been taken in yet.
        """
        return self._state.ordered(self._experiment.task_names)

    # Taking vectors in ----------------------------------------------------------------------------

    def add(self, tasks: Sequence[str]) -> BuilderStatus:
        """Take in the committed vectors of tasks: read each once, extend and save the Gram matrix.

        A repeated call changes nothing. A vector that was made again replaces its old row. A vector
        that cannot be used is left out and named in the returned status; the others are taken in.
        """
        committed, failed = self._committed(tasks)
        if self._unknown(committed):
            self._writer.check()
            new = self._unknown(committed)  # the state is read anew with the right to write
            if new:
                failed |= self._take_in(new)
        return replace(self.status(), failed=failed)

    def _committed(self, tasks: Sequence[str]) -> tuple[list[VectorVersion], dict[str, str]]:
        """The committed vectors of the tasks, and by task a message for each that is not committed.

        Each record is read once.
        """
        versions: list[VectorVersion] = []
        missing: dict[str, str] = {}
        for task in dict.fromkeys(tasks):
            task_store = self._tasks[task]
            record = task_store.basis_vector()
            if record is None:
                where = self._store.where(task_store.basis_vector_key)
                missing[task] = f"{where} has not been committed"
            else:
                versions.append(VectorVersion.of(task, record))
        return versions, missing

    def _unknown(self, versions: Sequence[VectorVersion]) -> list[VectorVersion]:
        """The versions that have no row in the Gram matrix."""
        return [v for v in versions if self._state.checksums.get(v.task) != v.checksum]

    def _take_in(self, new: Sequence[VectorVersion]) -> dict[str, str]:
        """Extend the Gram matrix and the online bases.

        Returns, by task, why a vector cannot be used.
        """
        replaced = [version.task for version in new if version.task in self._state.checksums]
        if replaced:
            self._state.forget(replaced)
            self._writer.save(self._state)
        failed = self._shards.fetch(new)
        usable = [version for version in new if version.task not in failed]
        if usable:
            failed |= self._extend(usable)
        for basis in self._online:
            basis.follow(self._state.checksums)
        return {task: str(error.with_remedy(REMEDY)) for task, error in failed.items()}

    def _extend(self, new: Sequence[VectorVersion]) -> dict[str, VectorError]:
        """Add the rows of vectors to the Gram matrix.

        Returns, by task, the error for each vector whose values are not finite.
        """
        before = len(self._state.tasks)
        known = [VectorVersion(task, checksum) for task, checksum in self._state.known]
        rows = self._shards.rows([*known, *new], len(new)).sum(dim=0)
        failed: dict[str, VectorError] = {}
        good: list[int] = []
        for position, version in enumerate(new):
            if bool(torch.isfinite(rows[position, before + position])):
                good.append(position)
            else:
                key = self._tasks[version.task].basis_vector_key
                failed[version.task] = VectorFile(self._store, key).complain()
        if good:
            columns = [*range(before), *(before + position for position in good)]
            self._append([new[position] for position in good], rows[good][:, columns])
        return failed

    def _append(self, new: Sequence[VectorVersion], rows: Tensor) -> None:
        """Store rows (new, T + new) of the Gram matrix, and for some arrivals the least errors."""
        total = len(self._state.tasks) + len(new)
        is_last = total == len(self._experiment.tasks)
        last_look = self._state.history[-1].vectors if self._state.history else 0
        history = []
        if total <= 64 or total >= 1.1 * last_look or is_last:
            floors = self._floors(grown(self._state.gram, rows))
            history = [Arrival(vectors=total, floor=floors)]
        pairs = [(version.task, version.checksum) for version in new]
        self._writer.append(self._state, pairs, rows, history)
        if is_last:
            self._writer.save(self._state)

    def _floors(self, gram: Tensor) -> dict[int, float]:
        """Least relative error of any M vectors, for each size M below the number of vectors."""
        values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
        total = values.sum()
        if not total > 0:
            return {}
        sizes = [size for size in sizes_of(self._experiment) if size < len(gram)]
        return {size: float(values[size:].sum() / total) for size in sizes}

    # Writing bases --------------------------------------------------------------------------------

    def write_bases(self, experiment: Experiment | None = None) -> WrittenBases:
        """Write every basis that has no record, or was made from other tasks. All offline bases
        share one pass over the vectors.

        experiment: the builder's, or the same one without the tasks that have no vector. Raises
        ValueError that names the vectors which have not been taken in yet.
        """
        if experiment is not None and experiment != self._experiment:
            self._experiment = experiment
            self._online = self._online_bases()
        gram = self.gram()
        for basis in self._online:
            basis.follow(self._state.checksums)
        missing = self._missing_bases()
        if not missing:
            return WrittenBases()
        self._writer.check()
        if self._state.snapshot < len(self._state.tasks):
            # The last task of the experiment brings a snapshot, but it may be missing.
            self._writer.save(self._state)
        notes = self._write_offline(gram, [spec for spec in missing if not spec.online])
        for basis in self._online:
            if basis.spec in missing:
                self._commit_online(basis, gram)
        if not self._experiment.missing:
            self._delete_smaller()
        return WrittenBases(tuple(spec.name for spec in missing), tuple(notes))

    def _delete_smaller(self) -> None:
        """Delete what was made from fewer tasks, and has a size that the present bases lack."""
        names = {spec.name for spec in basis_specs(self._experiment)}
        tasks = self._experiment.identity()["tasks"]
        for folder in (BASES, ONLINE):
            for prefix, record in records.find_all(self._store, folder).items():
                identity = {**record.identity, "tasks": tasks}
                is_smaller = covers_other_tasks(record.identity, identity, ())
                if is_smaller and prefix.removeprefix(f"{folder}/") not in names:
                    delete_thing(self._store, prefix)

    def _missing_bases(self) -> list[BasisSpec]:
        """The bases without a record, those that were made from other tasks, and online bases that
        have been started anew since.
        """
        online = {basis.spec: basis for basis in self._online}
        missing = []
        for spec in basis_specs(self._experiment):
            identity = basis_identity(self._experiment, spec)
            prefix, others = basis_prefix(spec.name), self._experiment.missing
            record = find_of_these_tasks(self._store, prefix, identity, others)
            if record is None or (spec in online and not online[spec].is_stored(record)):
                missing.append(spec)
        return missing

    def _write_offline(self, gram: Tensor, specs: Sequence[BasisSpec]) -> list[str]:
        """Fit, write and commit bases. Returns notes about them for the user."""
        if not specs:
            return []
        fits, notes = self._fits(gram, specs)
        versions = [VectorVersion(t, self._state.checksums[t]) for t in self._experiment.task_names]
        outputs = {basis_prefix(name): fit.B for name, fit in fits.items()}
        files = write_bases(self._store, self._shards, outputs, versions)
        for spec in specs:
            fit = fits[spec.name]
            metrics = BasisMetrics(
                tasks=self._experiment.task_names,
                vectors=fit.B.shape[1],
                convex=_is_convex(fit.B),
                relative_error=fit.loss,
                floor=fit.floor,
                condition=fit.condition,
            )
            self._commit(spec, fit.B, fit.W, files[basis_prefix(spec.name)], metrics)
        return notes

    def _fits(
        self, gram: Tensor, specs: Sequence[BasisSpec]
    ) -> tuple[dict[str, BasisFit], list[str]]:
        """Fits by name, and their warnings. One call fits all sizes of a method."""
        fits: dict[str, BasisFit] = {}
        notes: dict[str, None] = {}  # a dict, since several methods give the same warning
        for method in dict.fromkeys(spec.method for spec in specs):
            chosen = [spec for spec in specs if spec.method == method]
            sizes = [spec.size for spec in chosen]
            generator = torch.Generator().manual_seed(self._experiment.seed)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                results = fit_bases(gram, sizes, method=method, generator=generator)
            for spec, fit in zip(chosen, results, strict=True):
                fits[spec.name] = fit
            for warning in caught:
                if issubclass(warning.category, UserWarning):
                    notes[str(warning.message)] = None
        return fits, list(notes)

    def _commit_online(self, basis: OnlineBasis, gram: Tensor) -> None:
        """Commit an online basis that has followed all tasks. Its files are already stored."""
        H, W = basis.tables()
        metrics = BasisMetrics(
            tasks=self._experiment.task_names,
            vectors=H.shape[1],
            convex=_is_convex(H),
            relative_error=relative_loss(gram, H, W),
            floor=self._floors(gram).get(basis.spec.size, 0.0),
            condition=None,
            error_bounds=basis.error_bounds(),
        )
        self._commit(basis.spec, H, W, basis.write(), metrics)

    def _commit(
        self,
        spec: BasisSpec,
        B: Tensor,
        W: Tensor,
        written: dict[str, FileInfo],
        metrics: BasisMetrics,
    ) -> None:
        parents: dict[str, str] = {}
        for task in sorted(self._experiment.task_names):
            folder = basis_vector_prefix(self._experiment, task)
            parents[folder] = self._state.checksums[task]
        commit_over(
            self._store,
            basis_prefix(spec.name),
            written=written,
            identity=basis_identity(self._experiment, spec),
            files={tagged(COEFFICIENTS, tag_of(written)): write_coefficients(B, W)},
            parents=parents,
            metrics=metrics,
        )


def _is_convex(B: Tensor) -> bool:
    """Whether every column of B (T, M) is a convex combination, up to rounding."""
    return bool((B >= -1e-9).all()) and bool(((B.sum(0) - 1).abs() <= 1e-9).all())
