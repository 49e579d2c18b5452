"""The search trial in its worker: the rounds of one candidate, reported to Tune."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from ray import tune
from ray.exceptions import RayError

from raytvb.errors import UserError, described, raised_at
from raytvb.experiment.config import Experiment
from raytvb.orchestration.evaluation_service import Service
from raytvb.search.additions import InvalidCandidateError
from raytvb.search.candidates import Candidate
from raytvb.search.choice import comparable
from raytvb.search.identities import search_identity, search_parents
from raytvb.search.results import Invalid, Measured, RoundResult
from raytvb.search.rounds import known_rounds, round_prefix
from raytvb.search.trial import CandidateSearch
from raytvb.storage import records
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError, StoreKeyError

Report = dict[str, float | int | str]
"""What a trial reports to Tune about one round."""

PASSING_ERRORS = (
    OSError,
    RayError,
    MemoryError,
    torch.OutOfMemoryError,
    # New in torch 2.8, for what a GPU reports. A RuntimeError before.
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
)
"""Errors that may not come again if a trial runs again: of storage and networks, of Ray, and of a
GPU or a machine that others use too. Tune repeats a trial for these, and if its worker dies. All
others would come again: nothing in a trial is left to chance, so a wrong file or a mistake in the
code stays one.
"""

LASTING_ERRORS = (UserError, ValueError, StoreKeyError)
"""Errors that a user must correct, although some of them are an OSError too."""


class Rounds:
    """The rounds of one candidate: reads those in the store, measures and commits the next one."""

    def __init__(self, service: Service, candidate: Candidate) -> None:
        self._service = service
        self._candidate = candidate
        self._store = Store(service.experiment.store)
        self.results = self._known()

    def _known(self) -> list[RoundResult]:
        service = self._service
        return known_rounds(self._store, service.experiment, self._candidate, service.present)

    @cached_property
    def _search(self) -> CandidateSearch:
        evaluator = self._service.evaluator("val")
        return CandidateSearch(
            self._service.experiment, self._candidate, evaluator, self._service.present
        )

    def measure_next(self) -> RoundResult:
        """Measure the first round that is not in the store."""
        before = self.results[-1] if self.results else None
        if isinstance(before, Invalid):
            return before  # an invalid candidate stays invalid on more images
        try:
            return self._search.round(len(self.results) + 1, before)
        except InvalidCandidateError as error:
            return Invalid(invalid=str(error))

    def commit(self, result: RoundResult) -> None:
        """Write a result to the store as the first round that the store lacks."""
        records.commit(
            self._store,
            round_prefix(self._candidate, len(self.results) + 1),
            identity=search_identity(self._service.experiment, self._candidate),
            parents=search_parents(self._service.present, self._candidate),
            metrics=result,
        )
        self.results = self._known()


def run_trial(
    config: Mapping[str, int],
    service: Service,
    candidates: Sequence[Candidate],
    limits: Sequence[int],
) -> None:
    """Run the rounds of candidate `config["index"]` up to its limit. Report each round to Tune."""
    index = config["index"]
    experiment, candidate = service.experiment, candidates[index]
    experiment.resources.apply_to_storage()
    rounds = Rounds(service, candidate)
    for number in range(1, limits[index] + 1):
        if len(rounds.results) < number:
            try:
                result = rounds.measure_next()
            except Exception as problem:
                error = _explained(service, problem)
                if isinstance(error, PASSING_ERRORS) and not isinstance(error, LASTING_ERRORS):
                    raise
                # Tune repeats every trial that raises, so that a worker may die. This trial
                # therefore reports its error and returns.
                tune.report(_failure_report(experiment, number, _reason(error)))
                return
            rounds.commit(result)
        result = rounds.results[number - 1]
        tune.report(_report(experiment, candidate, number, result))
        if isinstance(result, Invalid):
            return


def _explained(service: Service, error: Exception) -> Exception:
    """The error of a trial, or that another run has replaced what the trial reads."""
    if not isinstance(error, StoreError):
        return error
    try:
        service.present.check_present(service.experiment)
    except UserError as replaced:
        return replaced
    except StoreError:
        return error
    return error


def _reason(error: BaseException) -> str:
    """An error in one line; one that is no message for users with its type and its place."""
    if isinstance(error, UserError | ValueError):
        return str(error)
    return f"{described(error)} [{raised_at(error)}]"


def _report(
    experiment: Experiment, candidate: Candidate, number: int, result: RoundResult
) -> Report:
    """What Tune, and through it TensorBoard, learns about a round."""
    report: Report = {
        "objective": comparable(result),
        "time": asha_time(experiment, number),
        "method": candidate.method,
        "size": candidate.size,
        "share": experiment.search.shares[number - 1],
    }
    if isinstance(result, Measured):
        for size, accuracy in result.accuracy.items():
            report[f"accuracy_{size}"] = accuracy
    return report


def _failure_report(experiment: Experiment, number: int, reason: str) -> Report:
    """What Tune learns about a round that failed."""
    return {"objective": -math.inf, "time": asha_time(experiment, number), "error": reason}


def asha_time(experiment: Experiment, number: int) -> float:
    """The time of a round for ASHA, whose milestones are powers of the reduction factor."""
    return float((1.0 / experiment.search.keep) ** (number - 1))
