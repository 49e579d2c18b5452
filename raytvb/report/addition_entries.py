"""Builds the entries of candidates: accuracies of additions, stored bytes, and errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytvb.evaluation.rows import Row, read_rows
from raytvb.experiment.metrics import BasisMetrics
from raytvb.report.accuracies import by_subset_size, measured, spread, weighted
from raytvb.report.finished_search import FinishedSearch
from raytvb.report.summary_contracts import Accuracies, AdditionEntry
from raytvb.search.candidates import FULL, Candidate
from raytvb.search.results import MeasuredOutcome
from raytvb.storage.store import Store


@dataclass(frozen=True)
class Entries:
    """The results that the entries of candidates are built from."""

    store: Store
    search: FinishedSearch
    bases: Mapping[str, BasisMetrics]
    gram: Tensor
    """(T, T) float64."""
    fine_tuned: Mapping[str, float]
    """Accuracy of each task's own model."""

    def all(self) -> dict[str, AdditionEntry]:
        """The entry of each candidate that was tested, by name."""
        full_rows = read_rows(self.store, FULL.name)
        full = self._all_added(full_rows, self.search.outcomes[FULL.name])
        entries = {}
        for candidate in self.search.tested:
            rows = read_rows(self.store, candidate.name)
            entries[candidate.name] = self._entry(candidate, rows, full)
        return entries

    def _entry(self, candidate: Candidate, rows: Sequence[Row], full: Accuracies) -> AdditionEntry:
        outcome = self.search.outcomes[candidate.name]
        accuracies = self._all_added(rows, outcome)
        tuned = outcome.vector
        return AdditionEntry(
            **dict(accuracies),
            merge=_merge_name(candidate),
            method=candidate.method,
            size=candidate.size,
            online=candidate.online,
            relative_error=self._relative_error(candidate),
            stored_bytes=outcome.stored_bytes,
            validation_objective=outcome.objective,
            validation_share=outcome.share,
            stopped=outcome.stopped,
            coefficient=outcome.coefficient,
            own_lengths=outcome.own_lengths,
            subsets=by_subset_size(_with_one_coefficient(rows, outcome)),
            spread=spread(accuracies, full),
            weighted=None if tuned is None else weighted(rows, tuned, self.fine_tuned),
        )

    def _all_added(self, rows: Sequence[Row], outcome: MeasuredOutcome) -> Accuracies:
        """Accuracies of the model to which all tasks are added with one coefficient."""
        count, plain = len(self.fine_tuned), _with_one_coefficient(rows, outcome)
        of_all_tasks = [row for row in plain if row.size == count]
        return measured(of_all_tasks, self.fine_tuned)

    def _relative_error(self, candidate: Candidate) -> float:
        """Share of the squared norm of all task vectors that the candidate does not reconstruct.

        For a table A over the task vectors, this is tr((A - I)' G (A - I)) / tr G.
        """
        if candidate.uses_stored_basis:
            return self.bases[candidate.basis].relative_error
        if candidate.table is None:
            return 0.0
        table = torch.tensor(candidate.table, dtype=torch.float64)
        rest = table - torch.eye(len(self.gram), dtype=torch.float64)
        return float(torch.trace(rest.T @ self.gram @ rest) / torch.trace(self.gram))


def _with_one_coefficient(rows: Sequence[Row], outcome: MeasuredOutcome) -> list[Row]:
    """The rows without those of the addition that has a coefficient for each vector."""
    if outcome.vector is None:
        return list(rows)
    return [row for row in rows if row.model != outcome.vector.kind]


def _merge_name(candidate: Candidate) -> str:
    """How the candidate makes one vector of the tasks' vectors, in the words of a summary."""
    if candidate.kind == "basis-sum":
        return "sum"
    return "decoded" if candidate.adds else candidate.merge_method
