"""Makes the one mask that all tasks share, in rounds on Ray.

Every round scores the entries that the round before has kept. A tree of Ray tasks sums the scores
of a round over the tasks. Scores and masks are arrays of D entries. They stay in Ray's object
store, and the driver sees only statuses.
"""

from __future__ import annotations

from typing import Any

from raytvb.experiment.identities import mask_identity
from raytvb.experiment.layout import SHARED_MASK, mask_prefix
from raytvb.finetuning.masks import add_scores, commit_shared_mask, score_task, select_round
from raytvb.orchestration.ray_tasks import (
    collect,
    raise_failed,
    ray_array_task,
    ray_task,
    result_of,
)
from raytvb.orchestration.run_context import RunContext
from raytvb.storage import records


def make_shared_mask(context: RunContext) -> None:
    """Make and commit the shared mask, unless it is in the store already."""
    experiment, stages = context.experiment, context.experiment.talos.stages
    identity = mask_identity(experiment, experiment.tasks)
    if records.find(context.store, mask_prefix(SHARED_MASK), identity) is not None:
        return
    kept: Any = None
    with context.reporter.stage("mask", stages) as stage:
        for number in range(1, stages + 1):
            kept = _selected(context, number, kept)
            stage.advance(f"round {number} of {stages}")
        commit = ray_task(commit_shared_mask, experiment, gpu=False)
        result_of(commit.remote(experiment, context.fingerprint, kept), "mask", "writing")


def _selected(context: RunContext, number: int, kept: Any) -> Any:
    """Reference to the mask after a round. kept: reference to the mask after the round before."""
    experiment = context.experiment
    score = ray_array_task(score_task, experiment)
    pending, scores = dict[Any, str](), list[Any]()
    for task in experiment.tasks:
        status, array = score.remote(experiment, context.fingerprint, task, number, kept)
        pending[status] = task.name
        scores.append(array)
    select = ray_array_task(select_round, experiment, gpu=False)
    selected, result = select.remote(experiment, _summed(context, scores), kept, number)
    raise_failed("mask", collect(pending))
    result_of(selected, "mask", f"round {number}")
    return result


def _summed(context: RunContext, arrays: list[Any]) -> Any:
    """Reference to the sum of arrays. Adds pairs, so that all sums of one level run at once."""
    add = ray_array_task(add_scores, context.experiment, gpu=False)
    while len(arrays) > 1:
        sums = []
        for left, right in zip(arrays[::2], arrays[1::2], strict=False):
            _, total = add.remote(left, right)
            sums.append(total)
        arrays = sums + arrays[2 * len(sums) :]  # the next level takes an array without a partner
    return arrays[0]
