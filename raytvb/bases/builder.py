"""The stream from task vectors to bases: each vector is taken in once it is committed.

How the room works, in reading order: `BasisBuilder` in this module keeps the exact Gram matrix of
all vectors and fits bases to it, which needs only T x T numbers. `shards` does all work on arrays
as long as a vector. `online` has the bases that follow the tasks one by one. `messages` has the
values that these modules pass to each other. `spectrum` shows what a basis of any size would lose.

The builder is a plain class; `orchestration` wraps it as a Ray actor. Its state is in the store
(see `storage.gram_state`). So a restarted actor goes on where it was, a repeated call changes
nothing, and of two actors only the later one writes, until the other one has read what it wrote.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from raytvb.bases.messages import BuilderStatus, Shards, VectorVersion, Versions, WrittenBases
from raytvb.bases.online import OnlineBasis
from raytvb.bases.shards import CoordinateShard, write_bases
from raytvb.errors import VectorError
from raytvb.experiment.basis_specs import BasisSpec, basis_specs, sizes_of
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import basis_identity
from raytvb.experiment.layout import COEFFICIENTS, basis_prefix, basis_vector_prefix
from raytvb.experiment.metrics import BasisMetrics
from raytvb.experiment.present_versions import basis_parents, is_present_basis
from raytvb.experiment.shared_masks import copy_mask
from raytvb.experiment.stored import write_coefficients
from raytvb.experiment.stored_vectors import StoredVector, basis_vectors_of, find_basis_vector
from raytvb.experiment.vector_states import fitting_vectors
from raytvb.maths.basis_fit import BasisFit, fit_bases, relative_loss
from raytvb.maths.gram_blocks import grown
from raytvb.maths.mixes import length_ratios
from raytvb.models.worker_process import worker_setup
from raytvb.storage import records
from raytvb.storage.basis_layout import tag_of
from raytvb.storage.gram_rows import Arrival
from raytvb.storage.gram_state import GramState, GramWriter, TakenOverError
from raytvb.storage.records import FileInfo
from raytvb.storage.replacing import commit_over, tagged
from raytvb.storage.store import Store
from raytvb.storage.vectors import VECTOR, VectorFile

REMEDY = "delete its folder in the store and run again to make it anew"
"""What a user can do about a stored vector that cannot be used, if its error does not say so."""


TAKEOVERS = 20
"""How often a call takes the right to write back from another run before it gives up."""

Result = TypeVar("Result")


class BasisBuilder:
    """Streams the vectors of one experiment into its Gram matrix, and writes the bases."""

    def __init__(self, experiment: Experiment, shards: Shards | None = None) -> None:
        """Reads the state in the store. The first change takes the right to write it.

        shards: by default one shard in this process.
        """
        worker_setup()
        experiment.resources.apply_to_storage()
        self._experiment, self._store = experiment, Store(experiment.store)
        self._shards = shards if shards is not None else CoordinateShard(experiment)
        self._state = GramState.undamaged(self._store)
        self._vectors: dict[str, StoredVector] = {}
        """The stored vectors of the Gram matrix, by task, as far as they have been looked up."""
        self._claimed: GramWriter | None = None
        self._online = self._online_bases()

    def _online_bases(self) -> list[OnlineBasis]:
        """The online bases of the experiment, as they are in the store."""
        bases: list[OnlineBasis] = []
        for spec in basis_specs(self._experiment):
            if spec.online:
                bases.append(OnlineBasis(self._experiment, self._store, self._shards, spec))
        return bases

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

    # The right to write ---------------------------------------------------------------------------

    @property
    def _writer(self) -> GramWriter:
        """The right to write, taken at first use.

        After that, a builder that had the right before reads again what is there before it writes.
        """
        if self._claimed is None:
            self._claimed = GramWriter(self._store)
            self._state = GramState.undamaged(self._store)  # as the builder before this one left it
            self._forget_outdated(self._claimed)
        return self._claimed

    def _forget_outdated(self, writer: GramWriter) -> None:
        """Remove the rows of vectors that are no longer there, or cannot be multiplied with ours.

        Other experiments may have vectors in the store, and theirs may be on another mask.
        """
        found = basis_vectors_of(self._experiment, self._state.tasks)
        self._vectors |= found
        fitting = fitting_vectors(self._experiment, found)
        outdated = []
        for task in self._state.tasks:
            vector = fitting.get(task)
            if vector is None or vector.checksum != self._state.checksums[task]:
                outdated.append(task)
        if outdated:
            self._state.forget(outdated)
            writer.save(self._state)

    def _with_right(self, work: Callable[[], Result]) -> Result:
        """Do work that writes the Gram matrix.

        If another run has taken the right over, what it has written is read, and the work is done
        again on top of it. So two runs that add tasks at the same time both get theirs in.
        """
        for attempt in range(TAKEOVERS):
            try:
                self._writer.check()
                return work()
            except TakenOverError:
                if attempt == TAKEOVERS - 1:
                    raise
                self._claimed = None
                self._online = self._online_bases()
        raise AssertionError("unreachable")

    # Taking vectors in ----------------------------------------------------------------------------

    def add(self, tasks: Sequence[str]) -> BuilderStatus:
        """Take in the committed vectors of tasks: read each once, extend and save the Gram matrix.

        A repeated call changes nothing. A vector that was made again replaces its old row. A vector
        that cannot be used is left out and named in the returned status; the others are taken in.
        """
        committed, failed = self._committed(tasks)

        def take_in() -> dict[str, str]:
            new = self._unknown(committed)  # the state is read anew with the right to write
            return self._take_in(new) if new else {}

        if self._unknown(committed):
            failed |= self._with_right(take_in)
        return replace(self.status(), failed=failed)

    def _committed(self, tasks: Sequence[str]) -> tuple[list[StoredVector], dict[str, str]]:
        """The committed vectors of the tasks, and by task a message for each that is not committed.

        Each record is read once.
        """
        vectors: list[StoredVector] = []
        missing: dict[str, str] = {}
        for task in dict.fromkeys(tasks):
            vector = find_basis_vector(self._experiment, task)
            if vector is None:
                where = self._store.where(basis_vector_prefix(self._experiment, task))
                missing[task] = f"{where}/{VECTOR} has not been committed"
            else:
                vectors.append(vector)
                self._vectors[task] = vector
        return vectors, missing

    def _unknown(self, vectors: Sequence[StoredVector]) -> list[StoredVector]:
        """The vectors that have no row in the Gram matrix."""
        return [v for v in vectors if self._state.checksums.get(v.task) != v.checksum]

    def _take_in(self, new: Sequence[StoredVector]) -> dict[str, str]:
        """Extend the Gram matrix and the online bases.

        Returns, by task, why a vector cannot be used.
        """
        replaced = [vector.task for vector in new if vector.task in self._state.checksums]
        if replaced:
            self._state.forget(replaced)
            self._writer.save(self._state)
        versions = [VectorVersion.of(vector) for vector in new]
        failed = self._shards.fetch(versions)
        usable = [version for version in versions if version.task not in failed]
        if usable:
            failed |= self._extend(usable)
        for basis in self._online:
            basis.follow(self._available())
        return {task: str(error.with_remedy(REMEDY)) for task, error in failed.items()}

    def _available(self) -> dict[str, VectorVersion]:
        """The vectors of the experiment that have a row in the Gram matrix, by task."""
        available = {}
        for task in self._experiment.task_names:
            vector = self._vectors.get(task)
            if vector is not None and self._state.checksums.get(task) == vector.checksum:
                available[task] = VectorVersion.of(vector)
        return available

    def _extend(self, new: Sequence[VectorVersion]) -> dict[str, VectorError]:
        """Add the rows of vectors to the Gram matrix.

        Returns, by task, the error for each vector whose values are not finite.
        """
        before = len(self._state.tasks)
        known = [VectorVersion.of(self._vectors[task]) for task in self._state.tasks]
        rows = self._shards.rows([*known, *new], len(new)).sum(dim=0)
        failed: dict[str, VectorError] = {}
        good: list[int] = []
        for position, version in enumerate(new):
            if bool(torch.isfinite(rows[position, before + position])):
                good.append(position)
            else:
                file = VectorFile(Store(version.url), version.key, info=version.file)
                failed[version.task] = file.complain()
        if good:
            columns = [*range(before), *(before + position for position in good)]
            self._append([new[position] for position in good], rows[good][:, columns])
        return failed

    def _append(self, new: Sequence[VectorVersion], rows: Tensor) -> None:
        """Store rows (new, T + new) of the Gram matrix, and for some arrivals the least errors."""
        total = len(self._state.tasks) + len(new)
        known = {*self._state.tasks, *(version.task for version in new)}
        is_last = known >= set(self._experiment.task_names)
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
        vectors = basis_vectors_of(self._experiment, self._experiment.task_names)
        self._vectors |= vectors
        gram = self._present_gram(vectors)
        available = self._available()
        for basis in self._online:
            basis.follow(available)
        missing = self._missing_bases(vectors)
        if not missing:
            return WrittenBases()
        if self._state.snapshot < len(self._state.tasks):
            # The last task of the experiment brings a snapshot, but it may be missing.
            self._with_right(lambda: self._writer.save(self._state))
        notes = self._write_offline(gram, [spec for spec in missing if not spec.online])
        for basis in self._online:
            if basis.spec in missing:
                self._commit_online(basis, gram)
        return WrittenBases(tuple(spec.name for spec in missing), tuple(notes))

    def _present_gram(self, vectors: Mapping[str, StoredVector]) -> Tensor:
        """As `gram`. ValueError: a vector has been made again since it was taken in."""
        for task in self._experiment.task_names:
            known = self._state.checksums.get(task)
            if known is not None and (task not in vectors or vectors[task].checksum != known):
                where = self._store.where(basis_vector_prefix(self._experiment, task))
                raise ValueError(
                    f"{where} has been made again by another run: run this again to take it in"
                )
        return self.gram()

    def _missing_bases(self, vectors: Mapping[str, StoredVector]) -> list[BasisSpec]:
        """The bases without a record, and those that were made of other vectors."""
        missing = []
        for spec in basis_specs(self._experiment):
            record = records.find(self._store, basis_prefix(spec.name))
            if record is None or not is_present_basis(
                self._store, self._experiment, spec, record, vectors
            ):
                missing.append(spec)
        return missing

    def _write_offline(self, gram: Tensor, specs: Sequence[BasisSpec]) -> list[str]:
        """Fit, write and commit bases. Returns notes about them for the user."""
        if not specs:
            return []
        fits, notes = self._fits(gram, specs)
        versions = [VectorVersion.of(self._vectors[t]) for t in self._experiment.task_names]
        outputs = {basis_prefix(name): fit.B for name, fit in fits.items()}
        self._copy_mask(versions)
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
            self._commit(spec, gram, fit.B, fit.W, files[basis_prefix(spec.name)], metrics)
        return notes

    def _copy_mask(self, versions: Versions) -> None:
        """Copy the mask of vectors of another store, which an index names by its path here."""
        key = self._shards.layout(versions).mask_key
        if key is not None:
            for url in {version.url for version in versions}:
                copy_mask(Store(url), self._store, key)

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
        self._copy_mask(list(self._available().values()))
        metrics = BasisMetrics(
            tasks=self._experiment.task_names,
            vectors=H.shape[1],
            convex=_is_convex(H),
            relative_error=relative_loss(gram, H, W),
            floor=self._floors(gram).get(basis.spec.size, 0.0),
            condition=None,
            error_bounds=basis.error_bounds(),
        )
        self._commit(basis.spec, gram, H, W, basis.write(), metrics)

    def _commit(
        self,
        spec: BasisSpec,
        gram: Tensor,
        B: Tensor,
        W: Tensor,
        written: dict[str, FileInfo],
        metrics: BasisMetrics,
    ) -> None:
        table = write_coefficients(B, W, length_ratios(gram, B @ W))
        commit_over(
            self._store,
            basis_prefix(spec.name),
            written=written,
            identity=basis_identity(self._experiment, spec),
            files={tagged(COEFFICIENTS, tag_of(written)): table},
            parents=basis_parents(self._experiment, self._vectors),
            metrics=metrics,
        )


def _is_convex(B: Tensor) -> bool:
    """Whether every column of B (T, M) is a convex combination, up to rounding."""
    return bool((B >= -1e-9).all()) and bool(((B.sum(0) - 1).abs() <= 1e-9).all())
