"""Which evaluations an experiment has, given what its search chose.

This folder measures each result once, after the choice. `plan` lists the evaluations. Each is a
class in one of the files that `plan` imports from, and `evaluation` has what they share. They write
the rows of `rows` under the names of `store_names`. `evaluators` gives them images and evaluators,
and `precision` decides whether evaluators may compute in bf16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raytvb.evaluation.additions import NamedAdditions, SubsetAdditions
from raytvb.evaluation.arrivals import OnlineArrivals
from raytvb.evaluation.disentanglement import Disentanglement
from raytvb.evaluation.evaluation import Evaluation
from raytvb.evaluation.negation import Negation
from raytvb.evaluation.single_models import SingleModels
from raytvb.evaluation.unseen import UnseenTask
from raytvb.experiment.config import Experiment, half
from raytvb.search.candidates import FULL, Candidate
from raytvb.search.results import Choice, InvalidOutcome, MeasuredOutcome, Outcome


def is_tested(experiment: Experiment, candidate: Candidate, outcome: Outcome) -> bool:
    """Whether the test split is read for a candidate.

    It is read if the candidate went through all rounds of the search. It is also read if the
    candidate has the size M = T/2, for the report shows every method at that size.
    """
    if isinstance(outcome, InvalidOutcome) or candidate.kind == "zero-shot":
        return False
    return not outcome.stopped or candidate.size == half(len(experiment.tasks))


def chosen_basis(candidates: Sequence[Candidate], choice: Choice) -> Candidate | None:
    """The basis that the search chose."""
    return next((c for c in candidates if c.name == choice.name), None)


def subjects(candidates: Sequence[Candidate], choice: Choice) -> list[Candidate]:
    """The candidates that operations are measured on: `full`, and the chosen basis if any."""
    basis = chosen_basis(candidates, choice)
    return [FULL] if basis is None else [FULL, basis]


def evaluations(
    experiment: Experiment,
    candidates: Sequence[Candidate],
    outcomes: Mapping[str, Outcome],
    choice: Choice,
    precision: str,
) -> list[Evaluation]:
    """All evaluations of the experiment, whether made already or not. outcomes: by candidate."""
    planned: list[Evaluation] = [SingleModels(precision)]
    tested = [c for c in candidates if is_tested(experiment, c, outcomes[c.name])]
    measured = {n: o for n, o in outcomes.items() if isinstance(o, MeasuredOutcome)}
    for candidate in tested:
        planned.append(SubsetAdditions(precision, candidate, measured[candidate.name]))
    for candidate in tested:
        if candidate.online and candidate.is_basis:
            planned += _arrivals(candidate, measured, precision)
    for candidate in subjects(candidates, choice):
        planned += _operations(experiment, candidate, precision)
    basis, learning = chosen_basis(candidates, choice), experiment.evaluate.unseen
    if basis is not None and learning is not None:
        for task in experiment.unseen:
            planned.append(UnseenTask(precision, basis, task, learning))
    return planned


def _arrivals(
    candidate: Candidate, measured: Mapping[str, MeasuredOutcome], precision: str
) -> list[Evaluation]:
    """The arrivals of an online basis, unless a source that it is compared with is invalid."""
    online = measured[candidate.name]
    offline = measured.get(candidate.offline.name)
    full = measured.get(FULL.name)
    if offline is None or full is None:
        return []
    return [OnlineArrivals(precision, candidate, online, offline, full)]


def _operations(experiment: Experiment, candidate: Candidate, precision: str) -> list[Evaluation]:
    """The operations on one of the `subjects`: negations, named additions, disentanglement."""
    planned: list[Evaluation] = []
    evaluate, search = experiment.evaluate, experiment.search
    if experiment.control is not None:
        for task in experiment.task_names:
            planned.append(Negation(precision, candidate, task, experiment.control, evaluate.keep))
    if evaluate.additions:
        planned.append(
            NamedAdditions(
                precision, candidate, evaluate.additions, search.coefficients, search.lengths
            )
        )
    if evaluate.disentanglement is not None:
        for pair in experiment.pairs:
            planned.append(Disentanglement(precision, candidate, pair, evaluate.disentanglement))
    return planned
