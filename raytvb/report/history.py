"""How a store grew: which vectors were made when and why, and what the online bases lost then."""

from __future__ import annotations

from raytvb.evaluation.rows import Row, prefix, read_rows
from raytvb.evaluation.store_names import online_name
from raytvb.experiment.layout import ONLINE, basis_prefix
from raytvb.experiment.metrics import OnlineMetrics, VectorMetrics
from raytvb.maths.counts import mean
from raytvb.storage import records
from raytvb.storage.contract import Contract
from raytvb.storage.damage import DamagedError
from raytvb.storage.records import Record
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreKeyError


class VectorArrival(Contract):
    """That a task vector was made."""

    time: str | None
    """When: UTC, as in 2026-01-31T12:00:00Z; null if its record, of an earlier format, does not
    say."""
    task: str
    reason: str | None
    """Why: `new`, or in what it differs from the one before; null as for `time`."""


class OnlineArrival(Contract):
    """What an online basis was after some tasks had arrived."""

    count: int
    """Number of tasks taken in so far."""
    tasks: tuple[str, ...]
    """The tasks that arrived last."""
    mean_bound: float | None
    """Mean of the upper bounds of the tasks' relative errors; null where its record, of an earlier
    format, does not say."""
    largest_bound: float | None
    accuracy: float | None
    """Mean test accuracy of the tasks so far, each decoded by itself; null if not measured."""


class OnlineHistory(Contract):
    """The arrivals in one online basis, in their order."""

    name: str
    arrivals: tuple[OnlineArrival, ...]


class History(Contract):
    """How a store grew."""

    vectors: tuple[VectorArrival, ...] = ()
    """Sorted by time. Vectors without a time come first."""
    online: tuple[OnlineHistory, ...] = ()


def read_history(store: Store) -> History:
    """How a store grew, from its records and the rows of evaluations.

    Raises DamagedError for a damaged record of a vector or of an online basis.
    """
    vectors: list[VectorArrival] = []
    for folder, record in records.find_all(store, "vectors").items():
        if not folder.endswith("/checkpoint"):
            vectors += _arrivals_of(store, folder, record)
    vectors.sort(key=lambda arrival: (arrival.time or "", arrival.task))
    online = []
    for folder, record in records.find_all(store, ONLINE).items():
        online.append(_online_history(store, folder, record))
    return History(vectors=tuple(vectors), online=tuple(online))


def _arrivals_of(store: Store, folder: str, record: Record) -> list[VectorArrival]:
    task = folder.partition("/")[2]
    history = record.metrics_as(VectorMetrics, store.where(folder)).history
    if not history:
        return [VectorArrival(time=None, task=task, reason=None)]
    return [VectorArrival(time=made.time, task=task, reason=made.reason) for made in history]


def _online_history(store: Store, folder: str, record: Record) -> OnlineHistory:
    name = folder.partition("/")[2]
    metrics = record.metrics_as(OnlineMetrics, store.where(folder))
    bounds = {each.tasks: each for each in metrics.bounds}
    accuracies = _accuracies(store, name, record)
    arrivals, before = [], 0
    for count in sorted(bounds.keys() | accuracies.keys()):
        known = bounds.get(count)
        arrivals.append(
            OnlineArrival(
                count=count,
                tasks=metrics.tasks[before:count],
                mean_bound=None if known is None else known.mean,
                largest_bound=None if known is None else known.largest,
                accuracy=accuracies.get(count),
            )
        )
        before = count
    return OnlineHistory(name=name, arrivals=tuple(arrivals))


def _accuracies(store: Store, name: str, online: Record) -> dict[int, float]:
    """The mean accuracies after each number of arrivals; {} if they were not measured."""
    try:
        rows = read_rows(store, online_name(name))
        measured = records.find(store, prefix(online_name(name)))
        basis = records.find(store, basis_prefix(name))
    except (StoreKeyError, DamagedError):
        return {}
    if measured is not None and measured.parents and not _is_measured(measured, basis, name):
        return {}
    if basis is None or not set(basis.parents.values()) <= set(online.parents.values()):
        return {}  # the basis started anew since
    by_count: dict[int, list[float]] = {}
    for row in rows:
        if _is_single(row):
            by_count.setdefault(row.subset, []).append(row.accuracy)
    return {count: mean(values) for count, values in by_count.items()}


def _is_measured(measured: Record, basis: Record | None, name: str) -> bool:
    """Whether rows were measured on the basis that is there now."""
    if basis is None:
        return False
    checksums = {info.sha256 for info in basis.files.values()}
    return measured.parents.get(basis_prefix(name)) in checksums


def _is_single(row: Row) -> bool:
    """Whether a row is of a task that the online basis decoded by itself."""
    return row.model == "online" and row.size == 1
