"""The stage `finetune`: makes the masks, then runs one Ray task for each missing task vector.

If the stage `basis` follows in the same run, every vector goes to the basis actor as soon as it is
committed. The Gram matrix is then complete soon after the last fine-tune ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import OVERLAP, vector_prefix
from raytvb.experiment.metrics import VectorMetrics
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.finetune_task import finetune_task
from raytvb.finetuning.masks import record_overlap
from raytvb.finetuning.twins import make_twin
from raytvb.orchestration.progress import Stage
from raytvb.orchestration.ray_tasks import collect, raise_failed, ray_task, result_of
from raytvb.orchestration.run_context import RunContext
from raytvb.orchestration.shared_mask import make_shared_mask
from raytvb.orchestration.stream import Stream
from raytvb.storage import records
from raytvb.storage.records import Record


def finetune(context: RunContext, *, stream: bool) -> bool:
    """Commit the masks and vectors that the store lacks. Returns whether any vector was missing.

    stream: send committed vectors to a basis actor, which `context.stream` holds afterwards. Raises
    UserError that names the tasks that failed. The vectors of the other tasks are kept.
    """
    experiment, missing = context.experiment, context.missing_vectors()
    fingerprint = context.fingerprint  # puts the model into the store before a task needs it
    if missing and experiment.talos.mask == "shared" and experiment.talos.density < 1.0:
        make_shared_mask(context)
    failed = {}
    if stream:
        committed = [task for task in experiment.tasks if task not in missing]
        failed = make_missing_twins(context, committed)
        start_stream(context, [task for task in committed if task.name not in failed])
    with context.reporter.stage("finetune", len(missing)) as stage:
        failed |= _finetune_missing(context, fingerprint, missing, stage)
    if context.stream is not None:
        failed |= finish_stream(context.stream, failed)
    raise_failed("finetune", failed)
    _record_overlap(context)
    return bool(missing)


def start_stream(context: RunContext, committed: Sequence[TaskConfig]) -> Stream:
    """Start the basis actor, set `context.stream` to it, and offer it the committed vectors."""
    context.stream = Stream(context.experiment)
    for task in committed:
        context.stream.offer(task.name)
    return context.stream


def finish_stream(stream: Stream, failed: dict[str, str]) -> dict[str, str]:
    """Wait until the actor has taken in all vectors that were offered.

    failed: reasons of earlier failures, by task. Returns the reasons of the vectors that the actor
    could not use, by task. If anything failed, here or earlier, ends the actor, for the run stops.
    """
    stream.finish()
    if failed or stream.failed:
        stream.close()
    return stream.failed


def make_missing_twins(context: RunContext, tasks: Sequence[TaskConfig]) -> dict[str, str]:
    """Make the prepared twins that committed vectors lack, if the bases are built from such twins.

    A fine-tune makes its own twin. A twin is missing if it was deleted, or if the run was killed
    after the vector and before the twin. Returns the reasons of failures, by task.
    """
    experiment = context.experiment
    if experiment.basis.prepare == "none":
        return {}
    make, pending = ray_task(make_twin, experiment, gpu=False), dict[Any, str]()
    for task in tasks:
        if TaskStore(experiment, task).basis_vector() is None:
            pending[make.remote(experiment, task)] = task.name
    with context.reporter.stage("prepared", len(pending)) as stage:
        return collect(pending, lambda name, _: stage.advance(name))


def _finetune_missing(
    context: RunContext, fingerprint: str, missing: Sequence[TaskConfig], stage: Stage
) -> dict[str, str]:
    """Run one Ray task for each vector. Returns the reasons of failures, by task."""
    task_of, pending = ray_task(finetune_task, context.experiment), dict[Any, str]()
    for task in missing:
        call = task_of.remote(context.experiment, fingerprint, task)
        pending[call] = task.name

    def tell_committed(name: str, record: Record) -> None:
        metrics = record.metrics_as(VectorMetrics, context.store.where(vector_prefix(name)))
        notes = [f"{name}: loss {metrics.final_loss:.3f}", *_warnings(metrics, context.experiment)]
        if context.stream is not None:
            context.stream.offer(name)
            notes += context.stream.floor_notes()
        stage.advance(", ".join(notes))

    return collect(pending, tell_committed, context.stream.pump if context.stream else None)


def _warnings(metrics: VectorMetrics, experiment: Experiment) -> list[str]:
    """What a user should know about a fine-tune that succeeded."""
    warnings = []
    if metrics.skipped:
        warnings.append(f"{metrics.skipped} images cannot be read and are left out")
    if metrics.classes_without_images:
        warnings.append(f"{metrics.classes_without_images} classes have no training images")
    warmup = experiment.finetune.warmup
    if warmup >= max(1, metrics.steps):
        warnings.append(f"its {metrics.steps} steps end within the warm-up of {warmup:g}")
    return warnings


def _record_overlap(context: RunContext) -> None:
    """Measure how far the tasks' own masks overlap, unless the store has the result already."""
    experiment = context.experiment
    if not experiment.own_masks or len(experiment.tasks) < 2:
        return
    if records.find(context.store, OVERLAP) is None:
        call = ray_task(record_overlap, experiment, gpu=False).remote(experiment)
        result_of(call, "mask overlap", "masks")
