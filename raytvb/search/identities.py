"""The identity of each result of the search: all that it depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytvb.experiment.config import Experiment
from raytvb.search.candidates import Candidate


def search_identity(experiment: Experiment, candidate: Candidate) -> dict[str, Any]:
    """Identity of a candidate's rounds: everything but which others were searched, and what is
    chosen by.
    """
    identity = experiment.identity()
    asked = {k: identity["search"][k] for k in ("coefficients", "shares", "lengths")}
    kept = ("model", "seed", "talos", "finetune", "tasks")
    made = {"prepare": experiment.basis.prepare} if experiment.basis.prepare != "none" else {}
    return (
        {k: identity[k] for k in kept}
        | {"search": asked, "candidate": candidate.name, "precision": experiment.evaluate.precision}
        | made
    )


def choice_identity(experiment: Experiment, candidates: Sequence[Candidate]) -> dict[str, Any]:
    return {"candidates": [c.name for c in candidates], "search": experiment.identity()["search"]}
