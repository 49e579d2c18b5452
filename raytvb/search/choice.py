"""What a search decides from its rounds: an outcome for each candidate, and the choice.

`halving_state` says which rounds are still to be measured, `decide` draws the conclusions from the
rounds, and `commit_decision` writes the conclusions with the tables of `result_tables`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import SEARCH, search_prefix
from raytvb.experiment.present_versions import PresentVersions
from raytvb.maths.halving import Option, choose, halve, pareto_front
from raytvb.search.candidates import FULL, ZERO_SHOT, Candidate
from raytvb.search.identities import choice_identity, search_identity, search_parents
from raytvb.search.result_tables import results_table, tried_table
from raytvb.search.results import (
    Choice,
    Invalid,
    InvalidOutcome,
    Measured,
    MeasuredOutcome,
    Outcome,
    RoundResult,
)
from raytvb.search.rounds import find_choice, find_result, known_rounds
from raytvb.storage import records
from raytvb.storage.parquet import parquet_bytes
from raytvb.storage.store import Store


@dataclass(frozen=True)
class HalvingState:
    """How far the rounds of all candidates have come. Keys are the candidates' names."""

    rounds: Mapping[str, list[RoundResult]]
    """The rounds that have been measured."""
    limits: Mapping[str, int]
    """How many rounds each candidate goes through, as far as the measured rounds tell."""
    missing: Mapping[str, int]
    """How many rounds a candidate needs, for those candidates that have fewer."""

    def counted(self, name: str) -> list[RoundResult]:
        """The rounds that successive halving grants a candidate. More may have been measured."""
        return self.rounds[name][: self.limits[name]]


@dataclass(frozen=True)
class Decision:
    """What follows from the rounds of all candidates."""

    choice: Choice
    outcomes: Mapping[str, Outcome]
    """Outcomes, by the candidate's name."""


def comparable(result: RoundResult) -> float:
    """The number by which rounds are compared.

    It is the objective of a measured round. For an invalid round it is minus infinity, below every
    accuracy.
    """
    match result:
        case Measured():
            return result.objective
        case Invalid():
            return -math.inf


def halving_state(
    store: Store,
    experiment: Experiment,
    candidates: Sequence[Candidate],
    present: PresentVersions,
) -> HalvingState:
    """Successive halving over the rounds in the store."""
    rounds: dict[str, list[RoundResult]] = {}
    values: dict[str, list[float]] = {}
    for candidate in candidates:
        results = known_rounds(store, experiment, candidate, present)
        rounds[candidate.name] = results
        values[candidate.name] = [comparable(result) for result in results]
    groups = {candidate.name: candidate.group for candidate in candidates}
    search = experiment.search
    limits, missing = halve(values, groups, len(search.shares), search.keep)
    return HalvingState(rounds, limits, missing)


def is_measured(
    store: Store,
    experiment: Experiment,
    candidates: Sequence[Candidate],
    present: PresentVersions,
) -> bool:
    """Whether nothing is left to measure on validation images."""
    return not halving_state(store, experiment, candidates, present).missing


def decide(
    store: Store,
    experiment: Experiment,
    candidates: Sequence[Candidate],
    stored_bytes: Mapping[str, int],
    present: PresentVersions,
) -> Decision:
    """The conclusions from a search whose rounds are all measured.

    stored_bytes: by the candidate's name. Raises UserError that names the candidates with missing
    rounds.
    """
    state = halving_state(store, experiment, candidates, present)
    if state.missing:
        names = ", ".join(sorted(state.missing))
        raise UserError(f"{names}: not searched yet: run `raytvb search` first")
    outcomes: dict[str, Outcome] = {}
    for candidate in candidates:
        results = state.counted(candidate.name)
        size = stored_bytes[candidate.name]
        outcomes[candidate.name] = _outcome(results, len(experiment.search.shares), size)
    choice = _choice(experiment, candidates, state, outcomes, stored_bytes)
    for name, outcome in outcomes.items():
        if isinstance(outcome, MeasuredOutcome):
            conclusions = {"chosen": name == choice.name, "front": name in choice.front}
            outcomes[name] = outcome.model_copy(update=conclusions)
    return Decision(choice, outcomes)


def _outcome(results: Sequence[RoundResult], rounds: int, stored_bytes: int) -> Outcome:
    """A candidate after its last round, before the choice. rounds: how many a full search has."""
    measured = [result for result in results if isinstance(result, Measured)]
    objectives = tuple(result.objective for result in measured)
    evaluations = sum(result.evaluations for result in measured)
    images = sum(result.images for result in measured)
    match results[-1]:
        case Invalid() as last:  # halving grants no round after an invalid one
            return InvalidOutcome(
                invalid=last.invalid,
                objectives=(*objectives, None),
                evaluations=evaluations,
                images=images,
                stored_bytes=stored_bytes,
            )
        case Measured() as last:
            return MeasuredOutcome(
                objective=last.objective,
                share=last.share,
                coefficient=last.coefficient,
                own_lengths=last.own_lengths,
                accuracy=last.accuracy,
                objectives=objectives,
                stopped=len(results) < rounds,
                vector=last.vector,
                evaluations=evaluations,
                images=images,
                chosen=False,
                front=False,
                stored_bytes=stored_bytes,
            )


def _choice(
    experiment: Experiment,
    candidates: Sequence[Candidate],
    state: HalvingState,
    outcomes: Mapping[str, Outcome],
    stored_bytes: Mapping[str, int],
) -> Choice:
    """The choice among the candidates that went through all rounds."""
    stopped = {name for name, outcome in outcomes.items() if _is_stopped(outcome)}
    finished = [candidate for candidate in candidates if candidate.name not in stopped]
    options = _options(finished, state, stored_bytes)
    bases = [c for c in candidates if c.is_basis and c.name in options]
    # A basis with as many vectors as there are tasks compresses nothing. It is chosen only if there
    # is no smaller one.
    compressing = [c for c in bases if c.size < len(experiment.tasks)]
    eligible = [options[c.name] for c in compressing or bases]
    zero_shot = comparable(state.counted(ZERO_SHOT.name)[-1])
    chosen = choose(eligible, zero_shot, experiment.search.tolerance)
    return Choice(
        name=chosen,
        reason=None if chosen else _why_none(zero_shot, [options[c.name] for c in bases]),
        best=choose(eligible, zero_shot),
        objective_of=experiment.search.objective,
        tolerance=experiment.search.tolerance,
        zero_shot=zero_shot,
        front=tuple(pareto_front(list(options.values()))),
        stopped=tuple(sorted(stopped)),
        invalid={
            name: outcome.invalid
            for name, outcome in outcomes.items()
            if isinstance(outcome, InvalidOutcome)
        },
        candidates=len(candidates),
        evaluations=sum(outcome.evaluations for outcome in outcomes.values()),
        images=sum(outcome.images for outcome in outcomes.values()),
        selection="validation split only",
        test="read once for each candidate that went through all rounds, or has M = T/2, "
        "after this choice",
    )


def _is_stopped(outcome: Outcome) -> bool:
    return isinstance(outcome, MeasuredOutcome) and outcome.stopped


def _options(
    candidates: Sequence[Candidate], state: HalvingState, stored_bytes: Mapping[str, int]
) -> dict[str, Option]:
    """The candidates that may be on the Pareto front, by name: the bases and the full vectors."""
    options: dict[str, Option] = {}
    for candidate in candidates:
        if candidate.is_basis or candidate == FULL:
            values = tuple(comparable(result) for result in state.counted(candidate.name))
            size = stored_bytes[candidate.name]
            options[candidate.name] = Option(candidate.name, values, size)
    return options


def _why_none(zero_shot: float, bases: Sequence[Option]) -> str:
    """Why no basis was chosen."""
    best = max((option.values[-1] for option in bases), default=-math.inf)
    reason = (
        f"no basis is better on validation data than the pretrained model ({100 * zero_shot:.1f} %)"
    )
    if not math.isfinite(best):
        return f"{reason}; none could be measured"
    return f"{reason}; the best one has {100 * best:.1f} %"


def commit_decision(
    store: Store,
    experiment: Experiment,
    candidates: Sequence[Candidate],
    decision: Decision,
    present: PresentVersions,
) -> bool:
    """Write the new outcomes, then the choice with its tables. Returns whether that is new."""
    for candidate in candidates:
        outcome = decision.outcomes[candidate.name]
        if find_result(store, experiment, candidate, present) != outcome:
            records.commit(
                store,
                search_prefix(candidate.name),
                identity=search_identity(experiment, candidate),
                parents=search_parents(present, candidate),
                metrics=outcome,
            )
    if find_choice(store, experiment, candidates, present) == decision.choice:
        return False
    results = results_table(candidates, decision.outcomes)
    tried = tried_table(store, experiment, candidates, decision.outcomes, present)
    records.commit(
        store,
        SEARCH,
        identity=choice_identity(experiment, candidates),
        parents=present.of_vectors(),
        metrics=decision.choice,
        files={
            "results.parquet": parquet_bytes(results),
            "tried.parquet": parquet_bytes(tried),
        },
    )
    return True
