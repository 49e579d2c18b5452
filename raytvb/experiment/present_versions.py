"""The versions of vectors, bases and images that are there now.

A result says in the parents of its record which versions it was measured on. It counts as long as
these are the present ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from raytvb.errors import UserError
from raytvb.experiment.basis_specs import BasisSpec, basis_specs
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import basis_identity, basis_settings
from raytvb.experiment.layout import BASES, basis_prefix, basis_vector_prefix, vector_prefix
from raytvb.experiment.metrics import BasisMetrics
from raytvb.experiment.present_experiments import store_metrics
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.stored import BasisVersion
from raytvb.experiment.stored_vectors import StoredVector, basis_vectors_of, vectors_of
from raytvb.storage import records
from raytvb.storage.gram_rows import PREFIX as GRAM
from raytvb.storage.gram_state import GramState
from raytvb.storage.records import Record
from raytvb.storage.store import Store

Parents = dict[str, str]
"""Checksums of what a thing was made of, by names."""


@dataclass(frozen=True)
class PresentVersions:
    """The present versions of what an experiment's results are measured on.

    An object is small, and goes to the workers that measure.
    """

    vectors: Mapping[str, str]
    """Checksums of the task vectors, by task."""
    made_of: Mapping[str, str]
    """Checksums of the vectors that bases are made of, by task: the same, or those of twins."""
    bases: Mapping[str, str]
    """Checksums of the coefficient tables of the present bases, by name. A basis that was made of
    other vectors is not present."""
    images: Mapping[str, str]
    """Checksums of the descriptions of the tasks' images and classes, by task."""
    dated: bool
    """Whether results without parents no longer count (see `StoreMetrics`)."""

    def of_vectors(self, tasks: Iterable[str] | None = None) -> Parents:
        """Parents of a result on the vectors and images of some tasks. Default: of all."""
        names = list(self.vectors) if tasks is None else list(tasks)
        vectors = [[name, self.vectors[name]] for name in names]
        images = [[name, self.images[name]] for name in names]
        return {"vectors": digest(vectors), "images": digest(images)}

    def of_basis(self, name: str) -> Parents:
        """Parents of a result on a basis, and on the vectors and images of all tasks.

        Raises UserError if the basis is not there, or was made of other vectors.
        """
        if name not in self.bases:
            raise UserError(f"bases are missing ({name}): run `raytvb basis` first")
        return {**self.of_vectors(), basis_prefix(name): self.bases[name]}

    def basis(self, store: Store, name: str) -> BasisVersion:
        """The present version of a basis. Raises UserError if another one has taken its place."""
        version = BasisVersion.find(store, name)
        if version is None or version.checksum != self.bases.get(name):
            raise _replaced(store, basis_prefix(name))
        return version

    def stored_vectors(
        self, experiment: Experiment, tasks: Sequence[str] | None = None, *, twins: bool = False
    ) -> list[StoredVector]:
        """The present vectors of tasks (default: all), in their order.

        twins: those that bases are made of. Raises UserError if one has been made again since.
        """
        names = experiment.task_names if tasks is None else tasks
        wanted = self.made_of if twins else self.vectors
        found = (basis_vectors_of if twins else vectors_of)(experiment, names)
        for task in names:
            if task not in found or found[task].checksum != wanted.get(task):
                raise _replaced(Store(experiment.store), vector_prefix(task))
        return [found[task] for task in names]

    def gram(self, experiment: Experiment) -> Tensor:
        """The Gram matrix (T, T) float64 of the vectors that bases are made of.

        Raises UserError if it is of other vectors.
        """
        store = Store(experiment.store)
        state = GramState.read(store)
        for task in experiment.task_names:
            if state.checksums.get(task) != self.made_of.get(task):
                raise _replaced(store, GRAM)
        return state.ordered(experiment.task_names)

    def check_present(self, experiment: Experiment) -> None:
        """Raise UserError if a vector or basis of these is no longer the present one.

        For a reader whose files have gone: another run has replaced them.
        """
        now = present_versions(experiment)
        for task, checksum in self.vectors.items():
            if now.vectors.get(task) != checksum:
                raise _replaced(Store(experiment.store), vector_prefix(task))
        for name, checksum in self.bases.items():
            if now.bases.get(name) != checksum:
                raise _replaced(Store(experiment.store), basis_prefix(name))

    def counts(self, record: Record, parents: Parents) -> bool:
        """Whether a result counts whose parents should be these."""
        if not record.parents:
            return not self.dated and record.format < _WITH_PARENTS
        return record.parents == parents


def _replaced(store: Store, prefix: str) -> UserError:
    return UserError(
        f"{store.where(prefix)} has been made again by another run meanwhile: run this again when "
        f"that one has ended"
    )


_WITH_PARENTS = 3
"""The first format whose results have parents."""


def digest(value: object) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def images_of(task: TaskConfig) -> str:
    """Checksum of what describes the images and classes of a task, and its prompts."""
    return digest(task.described())


def present_versions(experiment: Experiment) -> PresentVersions:
    """What is there now for the tasks of an experiment. A few listings and many parallel reads."""
    store, names = Store(experiment.store), experiment.task_names
    vectors = vectors_of(experiment, names)
    made_of = basis_vectors_of(experiment, names) if experiment.basis.prepare != "none" else vectors
    checksums = {task: vector.checksum for task, vector in made_of.items()}
    bases, found = {}, records.find_all(store, BASES)
    for spec in basis_specs(experiment):
        record = found.get(basis_prefix(spec.name))
        if record is not None and is_present_basis(store, experiment, spec, record, made_of):
            bases[spec.name] = BasisVersion(store, spec.name, record).checksum
    return PresentVersions(
        vectors={task: vector.checksum for task, vector in vectors.items()},
        made_of=checksums,
        bases=bases,
        images={task.name: images_of(task) for task in experiment.every_task},
        dated=store_metrics(store).dated,
    )


def basis_parents(experiment: Experiment, vectors: Mapping[str, StoredVector]) -> Parents:
    """Parents of a basis of all tasks. vectors: those that bases are made of, by task.

    A vector of another store is named with the URL of that store.
    """
    own = Store(experiment.store)
    parents = {}
    for task in sorted(experiment.task_names):
        vector, folder = vectors[task], basis_vector_prefix(experiment, task)
        is_own = vector.store.url == own.url
        parents[folder if is_own else vector.store.where(folder)] = vector.checksum
    return parents


def is_present_basis(
    store: Store,
    experiment: Experiment,
    spec: BasisSpec,
    record: Record,
    vectors: Mapping[str, StoredVector],
) -> bool:
    """Whether a basis was made of the present vectors of all tasks, in the way that is asked for.

    vectors: those that bases are made of, by task.
    """
    if not set(experiment.task_names) <= vectors.keys():
        return False
    wanted = basis_settings(basis_identity(experiment, spec))
    if basis_settings(record.identity) != wanted:
        return False
    metrics = record.metrics_as(BasisMetrics, store.where(basis_prefix(spec.name)))
    if metrics.tasks != experiment.task_names:
        return False
    return record.parents == basis_parents(experiment, vectors)
