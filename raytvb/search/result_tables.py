"""The Parquet tables that a search writes next to its choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from raytvb.experiment.config import Experiment
from raytvb.experiment.present_versions import PresentVersions
from raytvb.maths.counts import Count, wilson
from raytvb.search.candidates import Candidate
from raytvb.search.results import Measured, MeasuredOutcome, Outcome
from raytvb.search.rounds import known_rounds
from raytvb.storage.contract import JsonObject
from raytvb.storage.store import Store

_OF_OUTCOME = (
    "objective",
    "share",
    "stopped",
    "invalid",
    "chosen",
    "front",
    "stored_bytes",
    "evaluations",
    "images",
)
"""Columns of `results.parquet` that are fields of the outcome."""


def results_table(
    candidates: Sequence[Candidate], outcomes: Mapping[str, Outcome]
) -> list[JsonObject]:
    """`results.parquet`: a row for each candidate, with columns for each number of tasks added."""
    sizes: set[int] = set()
    for outcome in outcomes.values():
        if isinstance(outcome, MeasuredOutcome):
            sizes.update(outcome.accuracy)
    rising = sorted(sizes)
    return [_result(candidate, outcomes[candidate.name], rising) for candidate in candidates]


def _result(candidate: Candidate, outcome: Outcome, sizes: Sequence[int]) -> JsonObject:
    row: JsonObject = {
        "candidate": candidate.name,
        # The table calls a basis sum `sum`. Programs that read the table rely on that word.
        "kind": "sum" if candidate.kind == "basis-sum" else candidate.kind,
        "method": candidate.method,
        "size": candidate.size,
        "online": candidate.online,
        "merge": candidate.merge_method,
    }
    fields = outcome.to_json()  # these have the same names for both kinds of outcome
    for column in _OF_OUTCOME:
        row[column] = fields[column]
    by_size: dict[str, Mapping[int, JsonValue]] = {}
    if isinstance(outcome, MeasuredOutcome):
        by_size["accuracy"] = outcome.accuracy
        by_size["coefficient"] = outcome.coefficient
        by_size["own_lengths"] = outcome.own_lengths
    for column in ("accuracy", "coefficient", "own_lengths"):
        for size in sizes:
            row[f"{column}_{size}"] = by_size.get(column, {}).get(size)
    return row


def tried_table(
    store: Store,
    experiment: Experiment,
    candidates: Sequence[Candidate],
    outcomes: Mapping[str, Outcome],
    present: PresentVersions,
) -> list[JsonObject]:
    """`tried.parquet`: a row for each setting that a round measured, for each number of tasks.

    A row has the counts and their Wilson interval.
    """
    table: list[JsonObject] = []
    for candidate in candidates:
        counted = len(outcomes[candidate.name].objectives)
        rounds = known_rounds(store, experiment, candidate, present)[:counted]
        for number, result in enumerate(rounds, 1):
            if isinstance(result, Measured):
                table += _tried_in_round(candidate, number, result)
    return table


def _tried_in_round(candidate: Candidate, number: int, result: Measured) -> list[JsonObject]:
    rows: list[JsonObject] = []
    for tried in result.tried:
        low, high = wilson(Count(tried.correct, tried.total))
        row: JsonObject = {"candidate": candidate.name, "round": number, "share": result.share}
        rows.append(row | tried.to_json() | {"low": low, "high": high})
    return rows
