"""The identity of each result of the search, and what it was measured on."""

from __future__ import annotations

from collections.abc import Sequence

from raytvb.experiment.config import Experiment
from raytvb.experiment.present_versions import Parents, PresentVersions
from raytvb.search.candidates import Candidate
from raytvb.storage.contract import JsonObject


def search_identity(experiment: Experiment, candidate: Candidate) -> JsonObject:
    """Identity of a candidate's rounds and outcome: how it is measured.

    What it is measured on are its parents (`search_parents`). The other candidates and the
    objective of the choice are left out: they may change, and the measurement stays valid.
    """
    settings = {"coefficients", "shares", "lengths"}
    identity: JsonObject = {
        "seed": experiment.seed,
        "tasks": [*experiment.task_names],
        "search": experiment.search.model_dump(mode="json", include=settings),
        "candidate": candidate.name,
        "precision": experiment.evaluate.precision,
    }
    if experiment.basis.prepare != "none":
        identity["prepare"] = experiment.basis.prepare
    return identity


def search_settings(identity: JsonObject) -> JsonObject:
    """The identity of a round or outcome in the form in which two of them are compared.

    Records of earlier formats have the tasks with all their fields, and more that only the vectors
    depend on.
    """
    names = ("seed", "search", "candidate", "precision", "prepare")
    settings: JsonObject = {name: identity[name] for name in names if name in identity}
    tasks = identity.get("tasks")
    listed = tasks if isinstance(tasks, list) else []
    settings["tasks"] = [task.get("name") if isinstance(task, dict) else task for task in listed]
    return settings


def search_parents(present: PresentVersions, candidate: Candidate) -> Parents:
    """What the rounds and the outcome of a candidate are measured on.

    Raises UserError if its basis is not there.
    """
    if candidate.uses_stored_basis:
        return present.of_basis(candidate.basis)
    return present.of_vectors()


def choice_identity(experiment: Experiment, candidates: Sequence[Candidate]) -> JsonObject:
    """Identity of the choice among candidates."""
    return {
        "candidates": [candidate.name for candidate in candidates],
        "search": experiment.identity()["search"],
        "tasks": [*experiment.task_names],
    }


def choice_settings(identity: JsonObject, experiment: Experiment) -> JsonObject:
    """The identity of a choice in the form in which two of them are compared.

    In earlier formats, a choice among all tasks of the experiment does not list them.
    """
    if "tasks" in identity or experiment.missing:
        return identity
    return {**identity, "tasks": [*experiment.task_names]}
