"""The stage `search`: finds the coefficients of every candidate and chooses a basis, on validation
images.
"""

from __future__ import annotations

from raytvb.experiment.present_versions import present_versions
from raytvb.orchestration.run_context import RunContext
from raytvb.orchestration.tune import run_search
from raytvb.search.candidates import all_candidates, candidate_bytes
from raytvb.search.choice import commit_decision, decide, is_measured
from raytvb.search.results import Choice


def search(context: RunContext) -> bool:
    """Measure the candidates that have not been measured, choose one, and record the choice.

    Returns whether anything was new.
    """
    store, experiment = context.store, context.experiment
    present = present_versions(experiment)
    candidates = all_candidates(store, experiment, present)
    measured = is_measured(store, experiment, candidates, present)
    if not measured:
        for split in context.measured_splits:
            context.split_refs(split)  # tells now, and not after the search, what is missing
        run_search(context.service(["val"], present), candidates, context.reporter.stage)
    sizes = candidate_bytes(store, experiment, candidates)
    decision = decide(store, experiment, candidates, sizes, present)
    new = commit_decision(store, experiment, candidates, decision, present)
    if new:
        context.reporter.say(_description(decision.choice))
    return new or not measured


def _description(choice: Choice) -> str:
    if choice.name is None:
        return f"note: no basis was chosen: {choice.reason}"
    front = ", ".join(choice.front)
    return f"chosen: {choice.name}; best for their size, accuracy against bytes: {front}"
