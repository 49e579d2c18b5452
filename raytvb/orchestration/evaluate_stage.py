"""The stage `evaluate`: measures the choice of the search once, on the test images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytvb.errors import UserError
from raytvb.evaluation.evaluation import Evaluation
from raytvb.evaluation.plan import evaluations
from raytvb.evaluation.store_names import unseen_name
from raytvb.experiment.missing import EVALUATE
from raytvb.experiment.present_versions import PresentVersions, present_versions
from raytvb.orchestration.evaluation_service import evaluate_group, evaluation_groups
from raytvb.orchestration.failures import Failure, raise_failed
from raytvb.orchestration.ray_tasks import collect, ray_task
from raytvb.orchestration.run_context import RunContext
from raytvb.search.candidates import all_candidates
from raytvb.search.results import Outcome
from raytvb.search.rounds import find_choice, find_result

NAMED = 3
"""A message names at most this many candidates that were not searched."""


def evaluate(context: RunContext) -> bool:
    """Run every evaluation that has no rows in the store. Returns whether there were any.

    Raises UserError if the search has not ended, or if evaluations failed.
    """
    present = present_versions(context.experiment)
    todo = _missing_evaluations(context, present)
    if not todo:
        return False
    splits = set[str]()
    for evaluation in todo:
        splits.update(evaluation.splits)
    service = context.service(sorted(splits), present)
    evaluate_in_worker = ray_task(evaluate_group, context.experiment)
    pending, failed = dict[Any, str](), dict[str, Failure]()
    for group in evaluation_groups(context.experiment, todo):
        names = ", ".join(evaluation.name for evaluation in group)
        pending[evaluate_in_worker.remote(service, group)] = names
    with context.reporter.stage("evaluate", len(pending)) as stage:

        def finish_group(names: str, reasons: dict[str, str]) -> None:
            for name, reason in reasons.items():
                failed[name] = Failure(reason)
            stage.advance(names)

        failed |= collect(context.experiment, pending, finish_group)
    _leave_out_unseen(context, failed)
    raise_failed("evaluate", failed)
    return True


def _leave_out_unseen(context: RunContext, failed: dict[str, Failure]) -> None:
    """Take the failures of unseen tasks out of `failed`: no other result depends on them."""
    for task in context.experiment.unseen:
        failure = failed.pop(unseen_name(task.name), None)
        if failure is not None:
            context.failures.add(EVALUATE, {task.name: failure})


def _missing_evaluations(context: RunContext, present: PresentVersions) -> Sequence[Evaluation]:
    """The evaluations without rows in the store, or with rows of other versions."""
    store, experiment = context.store, context.experiment
    candidates = all_candidates(store, experiment, present)
    choice = find_choice(store, experiment, candidates, present)
    outcomes, unsearched = dict[str, Outcome](), []
    for candidate in candidates:
        outcome = find_result(store, experiment, candidate, present)
        if outcome is None:
            unsearched.append(candidate.name)
        else:
            outcomes[candidate.name] = outcome
    if choice is None or unsearched:
        names = ", ".join(unsearched[:NAMED]) or "the candidates"
        more = " …" if len(unsearched) > NAMED else ""
        raise UserError(f"{names}{more} not searched yet: run `raytvb search` first")
    planned = evaluations(experiment, candidates, outcomes, choice, context.precision())
    return [e for e in planned if not e.is_done(store, present)]
