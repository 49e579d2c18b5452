"""Makes the one mask that all tasks share, in rounds on Ray.

Every round scores the entries that the round before has kept. A tree of Ray tasks sums the scores
of a round over the tasks. Scores and masks are arrays of D entries. They stay in Ray's object
store, and the driver sees only statuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raytvb.errors import UserError, listed
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import vector_prefix
from raytvb.experiment.missing import MASK
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.shared_masks import (
    SharedMask,
    copy_mask,
    find_shared_mask,
    last_shared_mask,
    next_mask_id,
)
from raytvb.finetuning.masks import add_scores, commit_shared_mask, score_task, select_round
from raytvb.orchestration.failures import Failure, stage_error
from raytvb.orchestration.ray_tasks import collect, ray_array_task, ray_task, result_of
from raytvb.orchestration.run_context import RunContext
from raytvb.storage.records import Record
from raytvb.storage.store import Store

NAMED = 8
"""A message names at most this many vectors."""


def make_shared_mask(
    context: RunContext, ready: Sequence[TaskConfig], committed: Mapping[str, Record]
) -> list[TaskConfig]:
    """Make and commit the shared mask, unless it is in the store already.

    It is scored on all tasks that can be scored. A mask that is there stays as it is, and serves
    the tasks that it was not scored on, too. Returns those tasks of `ready` that can be fine-tuned.
    The failures of the others are kept in `context.failures`.

    ready: the tasks without a vector whose data are there. committed: records of the vectors, by
    task. Raises UserError if one of these was trained on another mask.
    """
    mask = None if context.renews_mask else find_shared_mask(context.store, context.whole)
    if mask is None:
        names = {*committed, *(task.name for task in ready)}
        scored = _make_of_any(context, names, committed)
        ready = [task for task in ready if task.name in scored]
        mask = find_shared_mask(context.store, context.whole)
    if mask is not None:
        _check_trained_on(context, mask, committed)
    return list(ready)


def _make_of_any(context: RunContext, names: set[str], committed: Mapping[str, Record]) -> set[str]:
    """Make the mask from those of the named tasks that can be scored. Returns their names.

    Every round depends on the scores of all tasks before it. So if one fails, the mask is started
    again without it.
    """
    while names:
        failed = _make(context, context.whole.restricted(names))
        if not failed:
            break
        if failed.keys() & committed.keys():
            raise stage_error("mask", failed)
        context.failures.add(MASK, failed)
        names = names - failed.keys()
    return names


def _make(context: RunContext, experiment: Experiment) -> dict[str, Failure]:
    """Make and commit the mask from the scores of all tasks of an experiment.

    Returns the failures by task; if there are any, no mask is made.
    """
    stages, kept = experiment.talos.stages, None
    with context.reporter.stage("mask", stages) as stage:
        for number in range(1, stages + 1):
            scores, failed = _scores(context, experiment, number, kept)
            if failed:
                return failed
            select = ray_array_task(select_round, experiment, gpu=False)
            status, kept = select.remote(experiment, _summed(context, scores), kept, number)
            result_of(experiment, status, "mask", f"round {number}")
            stage.advance(f"round {number} of {stages}")
        commit = ray_task(commit_shared_mask, experiment, gpu=False)
        mask_id = next_mask_id(context.store)
        call = commit.remote(experiment, context.fingerprint, kept, mask_id)
        result_of(experiment, call, "mask", "writing")
    return {}


def _scores(
    context: RunContext, experiment: Experiment, number: int, kept: Any
) -> tuple[list[Any], dict[str, Failure]]:
    """References to the scores of a round, and the failures by task.

    kept: reference to the mask after the round before.
    """
    score = ray_array_task(score_task, experiment)
    pending, scores = dict[Any, str](), list[Any]()
    for task in experiment.tasks:
        status, array = score.remote(experiment, context.fingerprint, task, number, kept)
        pending[status] = task.name
        scores.append(array)
    return scores, collect(experiment, pending)


def adopt_mask(context: RunContext) -> None:
    """Copy the shared mask of the store that vectors are taken from, unless there is one here."""
    experiment = context.whole
    if experiment.vectors is None or not experiment.shares_mask:
        return
    mask = None if last_shared_mask(context.store) else find_shared_mask(context.store, experiment)
    if mask is not None:
        copy_mask(Store(experiment.vectors), context.store, mask.key)


def _check_trained_on(
    context: RunContext, mask: SharedMask, committed: Mapping[str, Record]
) -> None:
    """Raise UserError if a vector was trained on another mask than one that was made again."""
    others = []
    for task, record in committed.items():
        if record.parents.get("mask") != mask.fingerprint:
            others.append(context.store.where(vector_prefix(task)))
    if others:
        raise UserError(
            f"{listed(others, NAMED)}: trained on another mask than {mask.where}. Bring that mask "
            f"back, or run this again to train the tasks on the present mask"
        )


def _summed(context: RunContext, arrays: list[Any]) -> Any:
    """Reference to the sum of arrays. Adds pairs, so that all sums of one level run at once."""
    add = ray_array_task(add_scores, context.whole, gpu=False)
    while len(arrays) > 1:
        sums = []
        for left, right in zip(arrays[::2], arrays[1::2], strict=False):
            _, total = add.remote(left, right)
            sums.append(total)
        arrays = sums + arrays[2 * len(sums) :]  # the next level takes an array without a partner
    return arrays[0]
