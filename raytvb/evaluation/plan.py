"""Which evaluations an experiment has, given what its search chose: each from the full vectors and
from the basis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytvb.evaluation.additions import evaluate_additions, evaluate_candidate, evaluate_models
from raytvb.evaluation.arrivals import evaluate_online
from raytvb.evaluation.disentanglement import evaluate_disentanglement
from raytvb.evaluation.negation import evaluate_negation
from raytvb.evaluation.unseen import evaluate_unseen
from raytvb.experiment.config import Experiment, half
from raytvb.search.candidates import FULL, Candidate


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: its name in the store, what it depends on, and `function(experiment, name,
    identity, *arguments, *evaluators)` on some splits."""

    name: str
    function: Callable[..., None]
    arguments: tuple[Any, ...] = ()
    splits: tuple[str, ...] = ("test",)
    identity: Mapping[str, Any] = field(default_factory=dict)


Outcomes = Mapping[str, Mapping[str, Any]]


def is_tested(experiment: Experiment, candidate: Candidate, outcome: Mapping[str, Any]) -> bool:
    """The test split is read for it: it went through all rounds of the search, or every method is
    reported at its M.
    """
    if outcome["invalid"] or candidate.kind == "zero-shot":
        return False
    return not outcome["stopped"] or candidate.size == half(len(experiment.tasks))


def subjects(candidates: Sequence[Candidate], choice: Mapping[str, Any]) -> list[Candidate]:
    """What operations are measured on: the full vectors, and the chosen basis where there is
    one.
    """
    return [FULL, *(c for c in candidates if c.name == choice["name"])]


def evaluations(
    experiment: Experiment,
    candidates: Sequence[Candidate],
    outcomes: Outcomes,
    choice: Mapping[str, Any],
    fingerprint: str,
    precision: str,
) -> list[Evaluation]:
    """All that is to be evaluated, whether done or not."""
    found = [Evaluation("models", evaluate_models)]
    for c in candidates:
        if is_tested(experiment, c, outcomes[c.name]):
            chosen = {k: outcomes[c.name][k] for k in ("coefficient", "own_lengths", "vector")}
            found.append(
                Evaluation(c.name, evaluate_candidate, (c, *chosen.values()), identity=chosen)
            )
    found += _online(experiment, candidates, outcomes)
    asked = experiment.evaluate
    for c in subjects(candidates, choice):
        found += _negations(experiment, c)
        if asked.additions:
            identity = {
                "additions": asked.additions,
                "coefficients": experiment.search.coefficients.model_dump(),
                "lengths": experiment.search.lengths,
            }
            found.append(
                Evaluation(
                    f"additions/{c.name}", evaluate_additions, (c,), ("val", "test"), identity
                )
            )
        for pair in experiment.pairs:
            assert asked.disentanglement is not None
            identity = {"grid": asked.disentanglement.model_dump(exclude={"pairs"})}
            found.append(
                Evaluation(
                    pair_name(c.name, pair), evaluate_disentanglement, (c, pair), identity=identity
                )
            )
    if experiment.unseen and choice["name"] is not None:
        basis = subjects(candidates, choice)[1]
        assert asked.unseen is not None
        for index, task in enumerate(experiment.unseen):
            identity = {
                "basis": basis.name,
                "task": task.model_dump(mode="json"),
                "learning": asked.unseen.model_dump(exclude={"tasks"}),
            }
            found.append(
                Evaluation(
                    f"unseen/{task.name}",
                    evaluate_unseen,
                    (basis, fingerprint, index),
                    identity=identity,
                )
            )
    return [
        Evaluation(
            e.name, e.function, e.arguments, e.splits, {**e.identity, "precision": precision}
        )
        for e in found
    ]


def pair_name(candidate: str, pair: tuple[str, str]) -> str:
    """Name of the disentanglement of two tasks, whose own names may have slashes."""
    return f"disentanglement/{candidate}/{'+'.join(t.replace('/', '-') for t in pair)}"


def _online(
    experiment: Experiment, candidates: Sequence[Candidate], outcomes: Outcomes
) -> list[Evaluation]:
    found = []
    for c in (
        c
        for c in candidates
        if c.online and c.is_basis and is_tested(experiment, c, outcomes[c.name])
    ):
        chosen = {
            k: {f: outcomes[n][f] for f in ("coefficient", "own_lengths")}
            for k, n in (("online", c.name), ("offline", c.offline.name), ("full", "full"))
        }
        if all(each["coefficient"] for each in chosen.values()):
            found.append(
                Evaluation(f"online/{c.name}", evaluate_online, (c, chosen), identity=chosen)
            )
    return found


def _negations(experiment: Experiment, candidate: Candidate) -> list[Evaluation]:
    control = experiment.control
    if control is None:
        return []
    identity = {"control": control.model_dump(mode="json"), "keep": experiment.evaluate.keep}
    return [
        Evaluation(
            f"negation-{candidate.name}/{task}",
            evaluate_negation,
            (candidate, index, control.name),
            ("val", "test"),
            identity,
        )
        for index, task in enumerate(experiment.task_names)
    ]
