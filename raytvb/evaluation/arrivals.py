"""Measures the accuracy of an online basis after each arrival of a task."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytvb.bases.online import read_tables
from raytvb.evaluation.evaluation import Context, Evaluation, chosen_settings
from raytvb.evaluation.rows import Row, write_rows
from raytvb.evaluation.store_names import online_name
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import find_online_tables, online_prefix
from raytvb.experiment.metrics import OnlineMetrics
from raytvb.experiment.present_versions import Parents, PresentVersions
from raytvb.experiment.stored_vectors import vector_set
from raytvb.maths.basis_fit import fit_basis
from raytvb.maths.mixes import length_ratios
from raytvb.maths.online_basis import stored_arrivals, watched
from raytvb.models.evaluator import Evaluator
from raytvb.search.candidates import Candidate
from raytvb.search.results import MeasuredOutcome
from raytvb.storage import records
from raytvb.storage.contract import JsonObject
from raytvb.storage.records import Record
from raytvb.storage.store import Store
from raytvb.storage.vector_set import VectorSet


@dataclass(frozen=True)
class _Decoded:
    """The n tasks that have arrived, as combinations of stored vectors."""

    model: str
    outcome: MeasuredOutcome
    """What the search chose for this source, with all tasks present."""
    vectors: VectorSet
    """The vectors of all T tasks."""
    table: Tensor
    """(n, n) float64: column t represents task t."""
    ratios: Tensor
    """(n,) float64: length of each task vector divided by that of its decoded vector."""

    def weights(self, total: int, tasks: Sequence[int]) -> Tensor:
        """The weights (T, len(tasks) + 1) of the T = `total` vectors.

        There is one column for each of `tasks` by itself. The last column is the addition of all
        tasks that have arrived.
        """
        arrived = len(self.table)
        with_own_lengths = self.table * self.ratios
        single = with_own_lengths if self.outcome.own_lengths[1] else self.table
        together = with_own_lengths if self.outcome.own_lengths[total] else self.table
        weights = torch.zeros(total, len(tasks) + 1, dtype=torch.float64)
        weights[:arrived, :-1] = single[:, list(tasks)]
        weights[:arrived, -1] = together.sum(dim=1)
        return weights


@dataclass(frozen=True)
class _History:
    """An online basis in the store."""

    prefix: str
    record: Record
    tasks: tuple[str, ...]
    """The tasks in the order in which the basis took them in. A task that was missing in an earlier
    run comes later than in the experiment."""

    @classmethod
    def read(cls, store: Store, name: str) -> _History:
        """Raises StoreKeyError if the store has no such online basis."""
        prefix = online_prefix(name)
        record = records.read_record(store, records.record_key(prefix))
        return cls(prefix, record, record.metrics_as(OnlineMetrics, store.where(prefix)).tasks)

    def looks(self, buffer: int) -> list[int]:
        """The numbers of tasks after which the basis is measured."""
        total = len(self.tasks)
        files = self.record.files
        kept = [n for n in range(1, total + 1) if find_online_tables(files, n) is not None]
        return stored_arrivals(kept, total, buffer)


@dataclass(frozen=True)
class OnlineArrivals(Evaluation):
    """Test accuracy after each arrival of a task, from three sources of vectors.

    The sources are the online basis (`online`), a basis that is fitted to all vectors so far
    (`offline`), and these vectors themselves (`full`). The addition of n of T tasks has the
    coefficient for all tasks, times T/n. At most 16 arrivals are measured, on at most 16 tasks (see
    `maths.online_basis.watched`). In the rows, `model` is the source, `size` is 1 for a task by
    itself and 0 for the addition of all tasks so far, and `subset` is the number of tasks so far.
    """

    candidate: Candidate
    online: MeasuredOutcome
    offline: MeasuredOutcome
    full: MeasuredOutcome

    @property
    def name(self) -> str:
        """`online/` and the candidate's name."""
        return online_name(self.candidate.name)

    @property
    def choices(self) -> JsonObject:
        """The settings of all three sources."""
        return {
            "online": chosen_settings(self.online),
            "offline": chosen_settings(self.offline),
            "full": chosen_settings(self.full),
        }

    def parents(self, present: PresentVersions) -> Parents:
        """The basis, and the vectors of all tasks."""
        return present.of_basis(self.candidate.basis)

    def run(self, context: Context) -> None:
        """Measure, and write the rows."""
        experiment, test = context.experiment, context.evaluator("test")
        history = _History.read(context.store, self.candidate.name)
        total = len(experiment.tasks)
        rows: list[Row] = []
        for arrived in history.looks(experiment.basis.buffer):
            watched_tasks = [t for t in watched(total) if t < arrived]
            for decoded in self._decoded(context, history, arrived):
                rows += _rows(history.tasks, test, decoded, watched_tasks)
        write_rows(context.store, self.name, rows, self.identity, self.parents(context.present))

    def _decoded(self, context: Context, history: _History, arrived: int) -> Iterator[_Decoded]:
        """The three sources after `arrived` tasks."""
        experiment, names = context.experiment, history.tasks
        present = context.present
        prepared = vector_set(present.stored_vectors(experiment, names, twins=True))
        order = [experiment.task_names.index(name) for name in names[:arrived]]
        gram = present.gram(experiment)[order][:, order]
        stored = read_tables(context.store, history.prefix, history.record, arrived)
        online = stored["H"] @ stored["W"]
        yield _Decoded("online", self.online, prepared, online, length_ratios(gram, online))
        offline = self._fitted(experiment, gram)
        yield _Decoded("offline", self.offline, prepared, offline, length_ratios(gram, offline))
        own = torch.eye(arrived, dtype=torch.float64)
        ones = torch.ones(arrived, dtype=torch.float64)
        yield _Decoded(
            "full", self.full, vector_set(present.stored_vectors(experiment, names)), own, ones
        )

    def _fitted(self, experiment: Experiment, gram: Tensor) -> Tensor:
        """The coefficient table (n, n) of a basis that is fitted to the vectors so far."""
        with warnings.catch_warnings():
            # fit_basis warns of a basis with as many vectors as tasks, or more than their rank.
            warnings.simplefilter("ignore", UserWarning)
            fit = fit_basis(
                gram,
                self.candidate.size,
                method=self.candidate.method,
                generator=torch.Generator().manual_seed(experiment.seed),
            )
        return fit.B @ fit.W


def _rows(
    names: Sequence[str], test: Evaluator, decoded: _Decoded, tasks: Sequence[int]
) -> list[Row]:
    """Rows of each task by itself, then of all tasks on the model with all arrived tasks added."""
    total, arrived = len(names), len(decoded.table)
    single = decoded.outcome.coefficient[1]
    together = decoded.outcome.coefficient[total] * total / arrived
    models: list[tuple[int, float, Sequence[int]]] = [(1, single, [task]) for task in tasks]
    models.append((0, together, tasks))
    directions = decoded.vectors.combinations(decoded.weights(total, tasks))
    rows: list[Row] = []
    for (size, coefficient, measured), direction in zip(models, directions, strict=True):
        test.merge(direction, coefficient)
        for task in measured:
            name = names[task]
            count = test.count(name)
            rows.append(Row.of(decoded.model, "test", size, arrived, name, coefficient, count))
    return rows
