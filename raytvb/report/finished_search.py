"""Reads the finished search that a summary reports, and checks that its evaluations exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytvb.errors import UserError
from raytvb.evaluation.plan import evaluations, is_tested
from raytvb.evaluation.rows import key
from raytvb.evaluation.store_names import online_name
from raytvb.experiment.config import Experiment
from raytvb.search.candidates import Candidate, all_candidates
from raytvb.search.results import Choice, Outcome
from raytvb.search.rounds import find_choice, find_result
from raytvb.storage.store import Store


@dataclass(frozen=True)
class FinishedSearch:
    """A finished search that the store has all evaluations of."""

    choice: Choice
    outcomes: Mapping[str, Outcome]
    tested: Sequence[Candidate]
    """The candidates that were measured on the test split."""
    arrivals: Sequence[Candidate]
    """Those of the tested candidates that were also measured after each arrival."""


def finished_search(store: Store, experiment: Experiment, precision: str) -> FinishedSearch:
    """The finished search of an experiment.

    precision: number format that its evaluations ran in. Raises UserError if something has not been
    searched or evaluated.
    """
    candidates = all_candidates(store, experiment)
    choice, outcomes = find_choice(store, experiment, candidates), {}
    for candidate in candidates:
        outcome = find_result(store, experiment, candidate)
        if choice is None or outcome is None:
            raise _missing(candidate.name, "searched")
        outcomes[candidate.name] = outcome
    assert choice is not None  # there are candidates
    planned = {e.name for e in evaluations(experiment, candidates, outcomes, choice, precision)}
    evaluated = set(store.keys("evals"))
    for name in sorted(planned):
        if key(name) not in evaluated:
            raise _missing(name, "evaluated")
    tested = [c for c in candidates if is_tested(experiment, c, outcomes[c.name])]
    arrivals = [c for c in tested if online_name(c.name) in planned]
    return FinishedSearch(choice, outcomes, tested, arrivals)


def _missing(name: str, step: str) -> UserError:
    return UserError(f"{name} has not been {step} yet: run `raytvb run` first")
