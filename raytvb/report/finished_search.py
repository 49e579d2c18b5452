"""Reads the finished search that a summary reports, and checks that its evaluations exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytvb.errors import UserError
from raytvb.evaluation.plan import chosen_basis, evaluations, is_tested
from raytvb.evaluation.rows import check_whole
from raytvb.evaluation.store_names import online_name
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import SEARCH
from raytvb.experiment.present_versions import present_versions
from raytvb.search.candidates import Candidate, all_candidates
from raytvb.search.results import Choice, MeasuredOutcome, Outcome
from raytvb.search.rounds import find_choice, find_result
from raytvb.storage import records
from raytvb.storage.damage import unreadable
from raytvb.storage.store import Store


@dataclass(frozen=True)
class FinishedSearch:
    """A finished search that the store has all evaluations of."""

    choice: Choice
    outcomes: Mapping[str, MeasuredOutcome]
    """By the candidate's name, of those that could be measured."""
    chosen: Candidate | None
    """The basis that the search chose, one of the tested candidates; None if it chose none."""
    tested: Sequence[Candidate]
    """The candidates that were measured on the test split."""
    arrivals: Sequence[Candidate]
    """Those of the tested candidates that were also measured after each arrival."""


def finished_search(store: Store, experiment: Experiment, precision: str) -> FinishedSearch:
    """The finished search of an experiment.

    precision: number format that its evaluations ran in. Raises UserError if something has not been
    searched or evaluated, and StoreError for a record that cannot be read.
    """
    present = present_versions(experiment)
    candidates = all_candidates(store, experiment, present)
    choice, outcomes = find_choice(store, experiment, candidates, present), dict[str, Outcome]()
    for candidate in candidates:
        outcome = find_result(store, experiment, candidate, present)
        if outcome is None:
            raise _missing(candidate.name, "searched")
        outcomes[candidate.name] = outcome
    if choice is None:
        raise UserError(f"the search in {store.url} has not ended: run `raytvb run` first")
    planned = set()
    for evaluation in evaluations(experiment, candidates, outcomes, choice, precision):
        planned.add(evaluation.name)
        if not evaluation.is_done(store, present):
            check_whole(store, evaluation.name)
            raise _missing(evaluation.name, "evaluated")
    tested = [c for c in candidates if is_tested(experiment, c, outcomes[c.name])]
    chosen = chosen_basis(tested, choice)
    if chosen is None and choice.name is not None:
        problem = f"name: {choice.name} is not among the tested candidates"
        raise unreadable(records.where(store, SEARCH), problem)
    arrivals = [c for c in tested if online_name(c.name) in planned]
    measured = {n: o for n, o in outcomes.items() if isinstance(o, MeasuredOutcome)}
    return FinishedSearch(choice, measured, chosen, tested, arrivals)


def _missing(name: str, step: str) -> UserError:
    return UserError(f"{name} has not been {step} yet: run `raytvb run` first")
