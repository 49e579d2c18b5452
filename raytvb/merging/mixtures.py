"""Turns addends into weights of stored vectors, and looks up the coefficient that was chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raytvb.errors import UserError
from raytvb.experiment.layout import SEARCH, search_prefix
from raytvb.experiment.present_experiments import store_metrics
from raytvb.experiment.present_versions import digest
from raytvb.experiment.stored import BasisVersion
from raytvb.experiment.stored_vectors import StoredVector, find_vectors, vector_set
from raytvb.maths.basis_registry import convex_methods
from raytvb.maths.merge_registry import MERGE_METHODS
from raytvb.maths.mixes import decoded, summed, vector_of
from raytvb.merging.addends import Addends, BasisSum, BasisVectors, Tasks
from raytvb.search.candidates import ADDITION, FULL
from raytvb.search.results import MeasuredOutcome, Outcome, Setting, parse_outcome
from raytvb.storage import records
from raytvb.storage.checked_file import CheckedFile
from raytvb.storage.damage import differs
from raytvb.storage.records import Record
from raytvb.storage.store import Store
from raytvb.storage.vector_set import Coordinates


@dataclass(frozen=True)
class Mixture:
    """coefficient * sum_f weights[f] * vectors[f], to be added to the pretrained weights."""

    source: str
    """Name of the search's candidate whose coefficient is used."""
    vectors: Coordinates
    """The F stored vectors."""
    weights: Tensor
    """(F,) float64."""
    setting: Setting
    """The coefficient that validation chose, and whether decoded vectors are stretched to the
    lengths of the task vectors."""
    columns: Tensor | None = None
    """(F, n) float64: for tasks, each of the n weighted task vectors. `weights` is their sum."""
    covers: tuple[str, ...] | None = None
    """The tasks that the basis was made of; None for the task vectors themselves."""


def mixture(
    store: Store, source: str, addends: Addends, coefficient: float | None = None
) -> Mixture:
    """The mixture of addends from `source`, which is `full` or the name of a basis.

    coefficient: takes the place of the one that validation chose, which is then not looked up.
    Raises UserError for a basis that the store lacks, for a basis that has no such vectors or sum,
    and for damaged files. Raises ValueError that names the tasks without a vector.
    """
    if source != FULL.name:
        return _of_basis(store, source, addends, coefficient)
    if not isinstance(addends, Tasks):
        raise UserError(
            f"`--merge sum` and --vector need the vectors of a basis: name one with --basis "
            f"(`raytvb ls {store.url}`)"
        )
    return _of_full_vectors(store, addends, coefficient)


def _of_full_vectors(store: Store, tasks: Tasks, coefficient: float | None) -> Mixture:
    stored = _stored_vectors(store)
    vector_of(list(stored), tasks.weights)  # raises if a task has no vector
    vectors = [stored[task] for task in tasks.weights]
    for vector in vectors:
        CheckedFile(vector.store, vector.key, vector.file).check()
    weights = torch.tensor(list(tasks.weights.values()), dtype=torch.float64)
    if coefficient is None:
        coefficient = _Searched(store, FULL.name).coefficient(tasks)
    return Mixture(FULL.name, vector_set(vectors), weights, Setting(coefficient), weights.diag())


def _stored_vectors(store: Store) -> dict[str, StoredVector]:
    """The vectors of a store, and of the one that it takes vectors from, by task.

    Raises UserError if there are none.
    """
    other = store_metrics(store).vectors
    sources = [store] if other is None else [store, Store(other)]
    tasks: dict[str, None] = {}
    for source in sources:
        for key in records.record_keys(source, "vectors"):
            task = records.prefix_of(key).removeprefix("vectors/")
            if not task.endswith("/checkpoint"):
                tasks[task] = None
    if not tasks:
        raise UserError(f"{store.url} holds no task vectors yet; run `raytvb run` first")
    return find_vectors(store, sources[1] if other is not None else None, tasks)


def _of_basis(store: Store, name: str, addends: Addends, coefficient: float | None) -> Mixture:
    version = BasisVersion.find(store, name)
    if version is None:
        names = sorted({key.split("/")[1] for key in store.keys("basis")})
        raise UserError(
            f"{store.url} has no basis {name!r}; it has {', '.join(names) or 'none'}, and `full`"
        )
    for file, info in version.record.files.items():
        CheckedFile(store, records.file_key(version.prefix, file), info).check()
    match addends:
        case Tasks():
            return _decoded(version, addends, coefficient)
        case BasisSum():
            return _basis_sum(version, coefficient)
        case BasisVectors():
            return _basis_vectors(version, addends)


def _decoded(version: BasisVersion, tasks: Tasks, coefficient: float | None) -> Mixture:
    """The mixture of tasks that are decoded from a basis."""
    x = vector_of(version.metrics.tasks, tasks.weights)
    searched = _Searched(version.store, version.name, version)
    own_lengths = tasks.lengths == "own"
    if tasks.lengths is None:
        own_lengths = searched.setting(tasks.added).own_lengths
    W = version.coefficients()[1]
    if own_lengths:
        W = W * version.ratios()
    alpha = searched.coefficient(tasks) if coefficient is None else coefficient
    return Mixture(
        version.name,
        version.vectors(),
        decoded(W, x),
        Setting(alpha, own_lengths),
        decoded(W, x.diag())[:, x != 0],
        version.metrics.tasks,
    )


def _basis_sum(version: BasisVersion, coefficient: float | None) -> Mixture:
    if not version.metrics.convex:
        raise UserError(
            f"the vectors of {version.name} are no convex combinations of task vectors, so their "
            f"plain sum has no meaning: use `--merge decoded`, or a basis of "
            f"{', '.join(convex_methods())}"
        )
    candidate, tasks = f"{version.name}-sum", version.metrics.tasks
    if coefficient is None:
        coefficient = _Searched(version.store, candidate, version).setting(len(tasks)).coefficient
    basis = version.vectors()
    setting = Setting(coefficient)
    return Mixture(candidate, basis, summed(basis.size), setting, covers=tasks)


def _basis_vectors(version: BasisVersion, addends: BasisVectors) -> Mixture:
    basis = version.vectors()
    missing = [str(number) for number in addends.weights if not 1 <= number <= basis.size]
    if missing:
        raise UserError(
            f"{version.name} has the vectors 1 to {basis.size}, not {', '.join(missing)}"
        )
    weights = torch.zeros(basis.size, dtype=torch.float64)
    for number, weight in addends.weights.items():
        weights[number - 1] = weight
    return Mixture(version.name, basis, weights, Setting(1.0), covers=version.metrics.tasks)


@dataclass(frozen=True)
class _Searched:
    """What the search chose for one source of vectors."""

    store: Store
    source: str
    """`full`, or the name of a candidate with a basis."""
    version: BasisVersion | None = None
    """The basis that is merged from; None for the task vectors themselves."""

    def setting(self, count: int, candidate: str | None = None) -> Setting:
        """The setting that validation chose for additions of `count` tasks.

        If the search has no such number of tasks, the setting for the nearest number. Without a
        search, and for a candidate that could not be measured, the coefficient 1 / count. Raises
        UserError if the search measured other versions of the vectors or the basis.
        """
        outcome = self._outcome(candidate or self.source)
        match outcome:
            case MeasuredOutcome():
                nearest = min(outcome.coefficient, key=lambda size: (abs(size - count), size))
                return outcome.setting(nearest)
            case _:
                return Setting(1.0 / count)

    def coefficient(self, tasks: Tasks) -> float:
        """The coefficient that validation chose to merge so many tasks by their method.

        If the merge method has not been searched: 1 for a method that is made for a coefficient of
        1, and otherwise the coefficient of addition.
        """
        if tasks.merge_method != ADDITION:
            candidate = f"{self.source}-{tasks.merge_method}"
            if self._outcome(candidate) is not None:
                return self.setting(tasks.added, candidate).coefficient
            if MERGE_METHODS.lookup(tasks.merge_method).coefficient == "one":
                return 1.0
        return self.setting(tasks.added).coefficient

    def _outcome(self, candidate: str) -> Outcome | None:
        """The outcome of a candidate in the search; None if it has not been searched.

        Raises DamagedError if the outcome of a candidate of a finished search is missing: without
        it, the merge would have another coefficient than the search chose.
        """
        store, prefix = self.store, search_prefix(candidate)
        record = records.find(store, prefix)
        if record is not None:
            self._check_measured(record)
            return parse_outcome(record.metrics, records.where(store, prefix))
        search = records.find(store, SEARCH)
        candidates = None if search is None else search.identity.get("candidates")
        if isinstance(candidates, list) and candidate in candidates:
            raise differs(records.where(store, prefix), store.url, "it is missing")
        return None

    def _check_measured(self, record: Record) -> None:
        """Raise UserError if an outcome was measured on other versions than the present ones."""
        if not record.parents:  # of an earlier format
            is_present = not store_metrics(self.store).dated
        elif self.version is not None:
            is_present = record.parents.get(self.version.prefix) == self.version.checksum
        else:
            is_present = record.parents.get("vectors") == self._vectors_digest(record)
        if not is_present:
            raise UserError(
                f"the coefficients for {self.source} were chosen before "
                f"{'this basis' if self.version else 'some of the vectors'} had been made again: "
                f"run `raytvb run` to choose them again, or give --coefficient"
            )

    def _vectors_digest(self, record: Record) -> str:
        """`PresentVersions.of_vectors` of the tasks that an outcome was measured on."""
        listed = record.identity.get("tasks")
        names = [str(name) for name in listed] if isinstance(listed, list) else []
        stored = _stored_vectors(self.store)
        return digest([[name, stored[name].checksum if name in stored else ""] for name in names])
