"""Makes again what committed vectors were trained with, if the store has lost it: their zero-shot
heads, and the masks of their own. A vector with a mask cannot be read without that mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import HEAD, head_prefix, mask_prefix, vector_prefix
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.masks import own_mask
from raytvb.models.pretrained_task import PretrainedTask
from raytvb.models.worker_process import worker_setup
from raytvb.orchestration.ray_tasks import collect, ray_task
from raytvb.orchestration.run_context import RunContext
from raytvb.storage.records import Record, record_key


def restore_parts(context: RunContext, committed: Mapping[str, Record]) -> None:
    """Make the heads and own masks of committed vectors that the store lacks. Two listings.

    What cannot be made is told, and does not end the run: a head is needed only where its task is
    measured again, and a vector without its mask is named by whoever reads it.

    committed: records of the vectors, by task.
    """
    experiment = context.whole
    keys = {*context.store.keys("heads"), *context.store.keys("masks")}
    restore, pending = ray_task(_restore, experiment), dict[Any, str]()
    for task in experiment.tasks:
        record = committed.get(task.name)
        if record is not None and not _is_whole(context, task, record, keys):
            pending[restore.remote(experiment, context.fingerprint, task)] = task.name
    with context.reporter.stage("restored", len(pending)) as stage:
        failed = collect(experiment, pending, lambda name, _: stage.advance(name))
    for name, failure in failed.items():
        context.reporter.say(f"{name}: its head or mask cannot be made again: {failure.reason}")


def _is_whole(context: RunContext, task: TaskConfig, vector: Record, keys: set[str]) -> bool:
    """Whether the store has the head of a vector, and its own mask if the vector lies there."""
    has_head = HEAD in vector.files or record_key(head_prefix(task.name)) in keys
    needs_mask = context.whole.own_masks and context.store.exists(
        record_key(vector_prefix(task.name))
    )
    return has_head and (not needs_mask or record_key(mask_prefix(task.name)) in keys)


def _restore(experiment: Experiment, fingerprint: str, task: TaskConfig) -> None:
    worker_setup()
    task_store = TaskStore(experiment, task)
    pretrained = PretrainedTask.load(task_store, fingerprint)  # makes the head
    if experiment.own_masks and task_store.own_vector():
        own_mask(task_store, pretrained)
