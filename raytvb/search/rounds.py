"""Rounds, outcomes and choices of searches in a store."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import SEARCH, search_prefix
from raytvb.search.candidates import Candidate
from raytvb.search.identities import choice_identity, search_identity
from raytvb.search.trial import objective
from raytvb.storage import records
from raytvb.storage.store import Store


def is_same(record: Mapping[str, Any] | None, identity: Mapping[str, Any]) -> bool:
    return record is not None and not records.differences(record["identity"], dict(identity))


def known_rounds(
    store: Store, experiment: Experiment, candidate: Candidate
) -> list[dict[str, Any]]:
    """Results of the first rounds of a candidate, as many as there are. Those of another search do
    not count.
    """
    found: list[dict[str, Any]] = []
    for number in range(1, len(experiment.search.shares) + 1):
        record = records.find(store, f"{search_prefix(candidate.name)}/round-{number}")
        if record is None or not is_same(record, search_identity(experiment, candidate)):
            break
        found.append(
            record["metrics"]
            | {
                "objective": objective(experiment, record["metrics"]["accuracy"])
                if "invalid" not in record["metrics"]
                else -math.inf
            }
        )
    return found


def find_result(
    store: Store, experiment: Experiment, candidate: Candidate
) -> dict[str, Any] | None:
    """What a finished search says of a candidate (see `_outcome`), or None where it has not been
    searched.
    """
    record = records.find(store, search_prefix(candidate.name))
    if record is None or not is_same(record, search_identity(experiment, candidate)):
        return None
    metrics: dict[str, Any] = record["metrics"]
    return metrics


def find_choice(
    store: Store, experiment: Experiment, candidates: Sequence[Candidate]
) -> dict[str, Any] | None:
    """What a finished search chose among the candidates, its Pareto front and how much it measured;
    else None.
    """
    record = records.find(store, SEARCH)
    if record is None or not is_same(record, choice_identity(experiment, candidates)):
        return None
    found: dict[str, Any] = record["metrics"]
    return found
