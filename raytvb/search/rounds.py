"""Reads the rounds, outcomes and choices of searches from a store."""

from __future__ import annotations

from collections.abc import Sequence

from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import SEARCH, search_prefix
from raytvb.search.candidates import Candidate
from raytvb.search.identities import choice_identity, search_identity
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
from raytvb.storage.store import Store


def round_prefix(candidate: Candidate, number: int) -> str:
    """Folder of the record of a candidate's round (numbered from 1)."""
    return f"{search_prefix(candidate.name)}/round-{number}"


def known_rounds(store: Store, experiment: Experiment, candidate: Candidate) -> list[RoundResult]:
    """The measured rounds of a candidate, from the first up to the first one that is missing.

    Rounds with another identity do not count. The objectives are computed again for this
    experiment, for its objective may have changed since the rounds were measured. Raises StoreError
    for a record that cannot be read.
    """
    rounds: list[RoundResult] = []
    for number in range(1, len(experiment.search.shares) + 1):
        prefix = round_prefix(candidate, number)
        record = records.find(store, prefix)
        if record is None or not record.is_of(search_identity(experiment, candidate)):
            break
        match parse_round(record.metrics, records.where(store, prefix)):
            case Measured() as measured:
                value = objective(experiment, measured.accuracy)
                rounds.append(measured.model_copy(update={"objective": value}))
            case Invalid() as invalid:
                rounds.append(invalid)
    return rounds


def find_result(store: Store, experiment: Experiment, candidate: Candidate) -> Outcome | None:
    """The outcome of a candidate in a finished search; None if there is none.

    Raises StoreError for a record that cannot be read.
    """
    prefix = search_prefix(candidate.name)
    record = records.find(store, prefix)
    if record is None or not record.is_of(search_identity(experiment, candidate)):
        return None
    return parse_outcome(record.metrics, records.where(store, prefix))


def find_choice(
    store: Store, experiment: Experiment, candidates: Sequence[Candidate]
) -> Choice | None:
    """The choice of a finished search among these candidates; None if there is no such search.

    Raises StoreError for a record that cannot be read.
    """
    record = records.find(store, SEARCH)
    if record is None or not record.is_of(choice_identity(experiment, candidates)):
        return None
    return record.metrics_as(Choice, store.where(SEARCH))
