"""The identity of each result of the search: all that it depends on."""

from __future__ import annotations

from collections.abc import Sequence

from raytvb.experiment.config import Experiment
from raytvb.search.candidates import Candidate
from raytvb.storage.contract import JsonObject


def search_identity(experiment: Experiment, candidate: Candidate) -> JsonObject:
    """Identity of a candidate's rounds and outcome.

    It holds everything that a measurement depends on. The other candidates and the objective of the
    choice are left out: they may change, and the measurement stays valid.
    """
    whole = experiment.identity()
    identity: JsonObject = {key: whole[key] for key in _MEASURED_ON}
    settings = {"coefficients", "shares", "lengths"}
    identity["search"] = experiment.search.model_dump(mode="json", include=settings)
    identity["candidate"] = candidate.name
    identity["precision"] = experiment.evaluate.precision
    if experiment.basis.prepare != "none":
        identity["prepare"] = experiment.basis.prepare
    return identity


_MEASURED_ON = ("model", "seed", "talos", "finetune", "tasks")


def choice_identity(experiment: Experiment, candidates: Sequence[Candidate]) -> JsonObject:
    """Identity of the choice among candidates."""
    identity: JsonObject = {
        "candidates": [candidate.name for candidate in candidates],
        "search": experiment.identity()["search"],
    }
    if experiment.missing:
        identity["tasks"] = [*experiment.task_names]
    return identity
