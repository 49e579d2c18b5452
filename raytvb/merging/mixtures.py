"""Turns addends into weights of stored vectors, and looks up the coefficient that was chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raytvb.errors import UserError
from raytvb.experiment.layout import SEARCH, basis_prefix, search_prefix, vector_prefix
from raytvb.experiment.metrics import BasisMetrics
from raytvb.experiment.stored import load_coefficients, stored_basis, vector_set
from raytvb.maths.basis_registry import convex_methods
from raytvb.maths.merge_registry import MERGE_METHODS
from raytvb.maths.mixes import decoded, length_ratios, summed, vector_of
from raytvb.merging.addends import Addends, BasisSum, BasisVectors, Tasks
from raytvb.search.candidates import ADDITION, FULL
from raytvb.search.results import MeasuredOutcome, Outcome, Setting, parse_outcome
from raytvb.storage import records
from raytvb.storage.damage import differs
from raytvb.storage.gram_state import GramState
from raytvb.storage.store import Store
from raytvb.storage.vector_set import Coordinates
from raytvb.storage.verify import check_files

_VECTOR = "vector.safetensors"


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


def mixture(store: Store, source: str, addends: Addends) -> Mixture:
    """The mixture of addends from `source`, which is `full` or the name of a basis.

    Raises UserError for a basis that the store lacks, for a basis that has no such vectors or sum,
    and for damaged files. Raises ValueError that names the tasks without a vector.
    """
    if source != FULL.name:
        return _of_basis(store, source, addends)
    if not isinstance(addends, Tasks):
        raise UserError(
            f"`--merge sum` and --vector need the vectors of a basis: name one with --basis "
            f"(`raytvb ls {store.url}`)"
        )
    return _of_full_vectors(store, addends)


def _of_full_vectors(store: Store, tasks: Tasks) -> Mixture:
    vector_of(_stored_tasks(store), tasks.weights)  # raises if a task has no vector
    for task in tasks.weights:
        check_files(store, vector_prefix(task), [_VECTOR])
    weights = torch.tensor(list(tasks.weights.values()), dtype=torch.float64)
    coefficient = _coefficient(store, FULL.name, tasks)
    return Mixture(
        FULL.name,
        vector_set(store.url, list(tasks.weights)),
        weights,
        Setting(coefficient),
        weights.diag(),
    )


def _stored_tasks(store: Store) -> list[str]:
    """The tasks that have a vector file or its record. Raises UserError if there are none."""
    tasks: dict[str, None] = {}
    for key in store.keys("vectors"):
        folder, _, name = key.removeprefix("vectors/").rpartition("/")
        if name in (_VECTOR, records.RECORD) and not folder.endswith("/checkpoint"):
            tasks[folder] = None
    if not tasks:
        raise UserError(f"{store.url} holds no task vectors yet; run `raytvb run` first")
    return list(tasks)


def _of_basis(store: Store, name: str, addends: Addends) -> Mixture:
    record = records.find(store, basis_prefix(name))
    if record is None:
        names = sorted({key.split("/")[1] for key in store.keys("basis")})
        raise UserError(
            f"{store.url} has no basis {name!r}; it has {', '.join(names) or 'none'}, and `full`"
        )
    check_files(store, basis_prefix(name))
    metrics = record.metrics_as(BasisMetrics, store.where(basis_prefix(name)))
    match addends:
        case Tasks():
            return _decoded(store, name, metrics, addends)
        case BasisSum():
            return _basis_sum(store, name, metrics)
        case BasisVectors():
            return _basis_vectors(store, name, addends)


def _decoded(store: Store, name: str, metrics: BasisMetrics, tasks: Tasks) -> Mixture:
    """The mixture of tasks that are decoded from a basis."""
    x = vector_of(metrics.tasks, tasks.weights)
    own_lengths = tasks.lengths == "own"
    if tasks.lengths is None:
        own_lengths = searched_setting(store, name, tasks.added).own_lengths
    B, W = load_coefficients(store, name)
    if own_lengths:
        W = W * length_ratios(GramState.read(store).ordered(metrics.tasks), B @ W)
    return Mixture(
        name,
        stored_basis(store.url, name),
        decoded(W, x),
        Setting(_coefficient(store, name, tasks), own_lengths),
        decoded(W, x.diag())[:, x != 0],
    )


def _basis_sum(store: Store, name: str, metrics: BasisMetrics) -> Mixture:
    if not metrics.convex:
        raise UserError(
            f"the vectors of {name} are no convex combinations of task vectors, so their plain sum "
            f"has no meaning: use `--merge decoded`, or a basis of {', '.join(convex_methods())}"
        )
    candidate = f"{name}-sum"
    setting = searched_setting(store, candidate, len(metrics.tasks))
    basis = stored_basis(store.url, name)
    return Mixture(candidate, basis, summed(basis.size), replace(setting, own_lengths=False))


def _basis_vectors(store: Store, name: str, addends: BasisVectors) -> Mixture:
    basis = stored_basis(store.url, name)
    missing = [str(number) for number in addends.weights if not 1 <= number <= basis.size]
    if missing:
        raise UserError(f"{name} has the vectors 1 to {basis.size}, not {', '.join(missing)}")
    weights = torch.zeros(basis.size, dtype=torch.float64)
    for number, weight in addends.weights.items():
        weights[number - 1] = weight
    return Mixture(name, basis, weights, Setting(1.0))


def searched_setting(store: Store, candidate: str, count: int) -> Setting:
    """The setting that validation chose for additions of `count` tasks.

    If the search has no such number of tasks, the setting for the nearest number. Without a search,
    and for a candidate that could not be measured, the coefficient 1 / count.
    """
    outcome = _outcome(store, candidate)
    match outcome:
        case MeasuredOutcome():
            nearest = min(outcome.coefficient, key=lambda size: (abs(size - count), size))
            return outcome.setting(nearest)
        case _:
            return Setting(1.0 / count)


def _coefficient(store: Store, source: str, tasks: Tasks) -> float:
    """The coefficient that validation chose to merge so many tasks from `source` by their method.

    If the merge method has not been searched: 1 for a method that is made for a coefficient of 1,
    and otherwise the coefficient of addition.
    """
    if tasks.merge_method != ADDITION:
        candidate = f"{source}-{tasks.merge_method}"
        if _outcome(store, candidate) is not None:
            return searched_setting(store, candidate, tasks.added).coefficient
        if MERGE_METHODS.lookup(tasks.merge_method).coefficient == "one":
            return 1.0
    return searched_setting(store, source, tasks.added).coefficient


def _outcome(store: Store, candidate: str) -> Outcome | None:
    """The outcome of a candidate in the search; None if it has not been searched.

    Raises DamagedError if the outcome of a candidate of a finished search is missing: without it,
    the merge would have another coefficient than the search chose.
    """
    prefix = search_prefix(candidate)
    record = records.find(store, prefix)
    if record is not None:
        return parse_outcome(record.metrics, records.where(store, prefix))
    search = records.find(store, SEARCH)
    candidates = None if search is None else search.identity.get("candidates")
    if isinstance(candidates, list) and candidate in candidates:
        raise differs(records.where(store, prefix), store.url, "it is missing")
    return None
