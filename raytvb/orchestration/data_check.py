"""Checks the data of tasks before they cost time on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytvb.data.census import Census
from raytvb.experiment.missing import DATA
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.models.pretrained_task import prepare_task
from raytvb.orchestration.ray_tasks import collect, ray_task
from raytvb.orchestration.run_context import RunContext


def check_tasks(context: RunContext, missing: Sequence[TaskConfig]) -> list[TaskConfig]:
    """Check the data of the tasks without a vector, in one Ray task each, and make their heads.

    The control and unseen tasks are checked with them, and also if their data was missing before.
    Returns those of the tasks without a vector that can be fine-tuned. The failures of the others
    are kept in `context.failures`.
    """
    experiment, fingerprint = context.whole, context.fingerprint
    checked = list(missing)
    for task in experiment.every_task:
        has_vector = task.name in experiment.task_names
        if not has_vector and (missing or task.name in context.failures.at(DATA)):
            checked.append(task)
    prepare, pending = ray_task(prepare_task, experiment, gpu=False), dict[Any, str]()
    for task in checked:
        splits = [split for split in context.splits if task in experiment.tasks_with(split)]
        call = prepare.remote(experiment, fingerprint, task, splits)
        pending[call] = task.name
    with context.reporter.stage("data", len(pending)) as stage:

        def tell(name: str, census: Census) -> None:
            stage.advance(name)
            for line in census.lines():
                context.reporter.say(f"{name}: {line}")

        failed = collect(experiment, pending, tell)
    context.failures.add(DATA, failed)
    context.failures.clear({task.name for task in checked} - failed.keys(), DATA)
    return [task for task in missing if task.name not in failed]
