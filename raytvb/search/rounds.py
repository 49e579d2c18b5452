"""Reads the rounds, outcomes and choices of searches from a store."""

from __future__ import annotations

from collections.abc import Sequence

from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import SEARCH, search_prefix
from raytvb.experiment.present_versions import PresentVersions
from raytvb.search.candidates import Candidate
from raytvb.search.identities import (
    choice_identity,
    choice_settings,
    search_identity,
    search_parents,
    search_settings,
)
from raytvb.search.results import (
    Choice,
    Invalid,
    Measured,
    Outcome,
    RoundResult,
    parse_outcome,
    parse_round,
)
from raytvb.search.trial import objective
from raytvb.storage import records
from raytvb.storage.records import Record
from raytvb.storage.store import Store


def round_prefix(candidate: Candidate, number: int) -> str:
    """Folder of the record of a candidate's round (numbered from 1)."""
    return f"{search_prefix(candidate.name)}/round-{number}"


def known_rounds(
    store: Store, experiment: Experiment, candidate: Candidate, present: PresentVersions
) -> list[RoundResult]:
    """The measured rounds of a candidate, from the first up to the first one that is missing.

    Rounds with another identity, or on other vectors than the present ones, do not count. The
    objectives are computed again for this experiment, for its objective may have changed since the
    rounds were measured. Raises StoreError for a record that cannot be read.
    """
    rounds: list[RoundResult] = []
    for number in range(1, len(experiment.search.shares) + 1):
        prefix = round_prefix(candidate, number)
        record = records.find(store, prefix)
        if record is None or not _counts(record, experiment, candidate, present):
            break
        match parse_round(record.metrics, records.where(store, prefix)):
            case Measured() as measured:
                value = objective(experiment, measured.accuracy)
                rounds.append(measured.model_copy(update={"objective": value}))
            case Invalid() as invalid:
                rounds.append(invalid)
    return rounds


def _counts(
    record: Record, experiment: Experiment, candidate: Candidate, present: PresentVersions
) -> bool:
    """Whether a round or outcome is of this candidate, and of the present vectors and basis."""
    wanted = search_identity(experiment, candidate)
    if search_settings(record.identity) != search_settings(wanted):
        return False
    return present.counts(record, search_parents(present, candidate))


def find_result(
    store: Store, experiment: Experiment, candidate: Candidate, present: PresentVersions
) -> Outcome | None:
    """The outcome of a candidate in a finished search; None if there is none.

    Raises StoreError for a record that cannot be read.
    """
    prefix = search_prefix(candidate.name)
    record = records.find(store, prefix)
    if record is None or not _counts(record, experiment, candidate, present):
        return None
    return parse_outcome(record.metrics, records.where(store, prefix))


def find_choice(
    store: Store,
    experiment: Experiment,
    candidates: Sequence[Candidate],
    present: PresentVersions,
) -> Choice | None:
    """The choice of a finished search among these candidates; None if there is no such search.

    Raises StoreError for a record that cannot be read.
    """
    record = records.find(store, SEARCH)
    wanted = choice_identity(experiment, candidates)
    if record is None or choice_settings(record.identity, experiment) != wanted:
        return None
    if not present.counts(record, present.of_vectors()):
        return None
    return record.metrics_as(Choice, store.where(SEARCH))
