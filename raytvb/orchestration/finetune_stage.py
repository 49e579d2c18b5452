"""The stage `finetune`: checks the data of the tasks without a vector, makes the masks, then runs
one Ray task for each missing task vector. A task that fails at a step is left out of the next ones.

If the stage `basis` follows in the same run, every vector goes to the basis actor as soon as it is
committed. The Gram matrix is then complete soon after the last fine-tune ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import twin_settings
from raytvb.experiment.layout import vector_prefix
from raytvb.experiment.metrics import VectorMetrics
from raytvb.experiment.missing import BASIS, DATA, FINETUNE, MASK, PREPARED
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.stored_vectors import basis_vectors_of, vectors_of
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.finetune_task import finetune_task
from raytvb.finetuning.masks import has_overlap, record_overlap
from raytvb.finetuning.twins import make_twin
from raytvb.orchestration.data_check import check_tasks
from raytvb.orchestration.failures import Failure, stage_error
from raytvb.orchestration.progress import Stage
from raytvb.orchestration.ray_tasks import collect, ray_task, result_of
from raytvb.orchestration.restored_parts import restore_parts
from raytvb.orchestration.run_context import RunContext
from raytvb.orchestration.shared_mask import adopt_mask, make_shared_mask
from raytvb.orchestration.stream import Stream
from raytvb.storage.records import Record

LOW_OVERLAP = 0.3
"""If the shared mask has a smaller share of a new task's own entries, a warning says so. By chance,
it has as many as its density, 0.1."""


def finetune(context: RunContext, *, stream: bool) -> bool:
    """Commit the masks and vectors that the store lacks. Returns whether any vector was missing.

    stream: send committed vectors to a basis actor, which `context.stream` holds afterwards. Tasks
    that fail are kept in `context.failures`. Raises UserError that names them if no task has a
    vector at the end.
    """
    experiment = context.whole
    adopt_mask(context)
    committed = {} if context.renews_mask else context.vector_records()
    missing = [task for task in experiment.tasks if task.name not in committed]
    fingerprint = context.fingerprint  # puts the model into the store before a task needs it
    ready = check_tasks(context, missing)
    if experiment.shares_mask and (ready or committed):  # a vector cannot be read without its mask
        ready = make_shared_mask(context, ready, committed)
    restore_parts(context, committed)
    if stream:
        stored = [task for task in experiment.tasks if task.name in committed]
        start_stream(context, with_twins(context, stored))
    with context.reporter.stage("finetune", len(ready)) as stage:
        _finetune_missing(context, fingerprint, ready, stage)
    if context.stream is not None:
        finish_stream(context, context.stream)
    _raise_without_vectors(context, missing)
    _record_overlap(context)
    return bool(missing)


def _raise_without_vectors(context: RunContext, missing: Sequence[TaskConfig]) -> None:
    """Raise UserError with the failures if no task has a vector; the run ends.

    missing: the tasks that had no vector before.
    """
    tasks = set(context.whole.task_names)
    parts = {part.name: part for part in context.missing_parts()}
    if len(missing) == len(tasks) and parts.keys() >= tasks:
        if context.stream is not None:
            context.stream.close()
        failed = {name: Failure(part.reason, part.attempts) for name, part in parts.items()}
        raise stage_error("finetune", failed)


def start_stream(context: RunContext, committed: Sequence[TaskConfig]) -> Stream:
    """Start the basis actor, set `context.stream` to it, and offer it the committed vectors."""
    context.stream = Stream(context.whole)
    for task in committed:
        context.stream.offer(task.name)
    return context.stream


def finish_stream(context: RunContext, stream: Stream) -> None:
    """Wait until the actor has taken in all vectors that were offered.

    The vectors that it could not use are kept in `context.failures`. Raises UserError if the actor
    itself failed.
    """
    stream.finish()
    if stream.errors:
        stream.close()
        raise stage_error(BASIS, stream.errors)
    context.failures.add(BASIS, stream.failed)
    context.failures.clear(stream.offered - stream.failed.keys(), BASIS)


def with_twins(context: RunContext, tasks: Sequence[TaskConfig]) -> list[TaskConfig]:
    """Make the prepared twins that committed vectors lack, if the bases are built from such twins.

    A fine-tune makes its own twin. A twin is missing if it was deleted, or if the run was killed
    after the vector and before the twin. Returns the tasks that have all that bases need; the
    failures of the others are kept in `context.failures`.
    """
    experiment = context.whole
    if experiment.basis.prepare == "none":
        return list(tasks)
    make, pending = ray_task(make_twin, experiment, gpu=False), dict[Any, str]()
    there = basis_vectors_of(experiment, [task.name for task in tasks])
    for task in tasks:
        twin, wanted = there.get(task.name), TaskStore(experiment, task).twin_identity
        if twin is None or twin_settings(twin.record.identity) != twin_settings(wanted):
            pending[make.remote(experiment, task)] = task.name
    with context.reporter.stage("prepared", len(pending)) as stage:
        failed = collect(experiment, pending, lambda name, _: stage.advance(name))
    context.failures.add(PREPARED, failed)
    context.failures.clear({task.name for task in tasks} - failed.keys(), PREPARED)
    return [task for task in tasks if task.name not in failed]


def _finetune_missing(
    context: RunContext, fingerprint: str, missing: Sequence[TaskConfig], stage: Stage
) -> None:
    """Run one Ray task for each vector. The failures are kept in `context.failures`."""
    experiment, pending = context.whole, dict[Any, str]()
    task_of = ray_task(finetune_task, experiment)
    for task in missing:
        pending[task_of.remote(experiment, fingerprint, task)] = task.name

    def tell_committed(name: str, record: Record) -> None:
        metrics = record.metrics_as(VectorMetrics, context.store.where(vector_prefix(name)))
        notes = [f"{name}: loss {metrics.final_loss:.3f}", *_warnings(metrics, experiment)]
        if context.stream is not None:
            context.stream.offer(name)
            notes += context.stream.floor_notes()
        stage.advance(", ".join(notes))

    pump = context.stream.pump if context.stream else None
    failed = collect(experiment, pending, tell_committed, pump, saves=True)
    context.failures.add(FINETUNE, failed)
    succeeded = {task.name for task in missing} - failed.keys()
    context.failures.clear(succeeded, DATA, MASK, FINETUNE, PREPARED)


def _warnings(metrics: VectorMetrics, experiment: Experiment) -> list[str]:
    """What a user should know about a fine-tune that succeeded."""
    warnings = []
    overlap = metrics.mask_overlap
    if overlap is not None:
        note = f"the shared mask has {100 * overlap:.0f} % of its own entries of lowest sensitivity"
        if overlap < LOW_OVERLAP:
            note = (
                f"warning: {note}, below {100 * LOW_OVERLAP:g} %: the mask may not suit this task "
                f"(`raytvb run --renew mask` makes it anew for all tasks)"
            )
        warnings.append(note)
    if metrics.skipped and experiment.data.leaks == "ignore":  # else the check of the data said so
        warnings.append(f"{metrics.skipped} images cannot be read and are left out")
    warmup = experiment.finetune.warmup
    if warmup >= max(1, metrics.steps):
        warnings.append(f"its {metrics.steps} steps end within the warm-up of {warmup:g}")
    return warnings


def _record_overlap(context: RunContext) -> None:
    """Measure how far the tasks' own masks overlap, unless the store has the result already."""
    context.leave_out_missing()
    experiment = context.experiment
    if not experiment.own_masks or len(experiment.tasks) < 2:
        return
    if not has_overlap(experiment, vectors_of(experiment, experiment.task_names)):
        call = ray_task(record_overlap, experiment, gpu=False).remote(experiment)
        result_of(experiment, call, "mask overlap", "masks")
