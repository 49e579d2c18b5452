"""What is missing of an experiment: tasks that failed, and tasks that have no vector yet.

A task that fails does not stop the others. Its failure is kept as a record, `failed/<task>`, until
it succeeds. All later stages, the report and `ls` work with the tasks that are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from raytvb.errors import FailedPart, PartialRunError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import FAILED, failed_prefix
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.shared_masks import find_shared_mask
from raytvb.experiment.vector_states import VectorState, vector_states
from raytvb.storage import records
from raytvb.storage.contract import Contract, JsonObject
from raytvb.storage.store import Store

DATA = "data"
"""Stage: a split of the task is missing, or its data cannot be opened."""

MASK = "mask"
FINETUNE = "finetune"
PREPARED = "prepared"
BASIS = "basis"
IMAGES = "images"
"""Stage: images of val or test cannot be read."""

EVALUATE = "evaluate"

AFTER_VECTOR = (PREPARED, BASIS, IMAGES)
"""A task that fails here has a vector, which cannot be used yet."""

LATER = (BASIS, IMAGES, EVALUATE)
"""Stages after fine-tuning."""


class TaskFailure(Contract):
    """Metrics in the record of a task that failed."""

    stage: str
    reason: str
    attempts: int


def failures(store: Store, experiment: Experiment) -> dict[str, FailedPart]:
    """The recorded failures of the tasks of an experiment, by name.

    Control and unseen tasks are among them. The failure of a task that has been changed since, as
    its data may be elsewhere now, does not count.
    """
    recorded = records.find_all(store, FAILED)
    parts = {}
    for task in experiment.every_task:
        record = recorded.get(failed_prefix(task.name))
        if record is not None and record.is_of(_identity(task)):
            metrics = record.metrics_as(TaskFailure, store.where(failed_prefix(task.name)))
            parts[task.name] = FailedPart(
                task.name, metrics.stage, metrics.reason, metrics.attempts
            )
    return parts


def commit_failure(store: Store, task: TaskConfig, part: FailedPart) -> None:
    """Keep the failure of a task."""
    records.commit(
        store,
        failed_prefix(task.name),
        identity=_identity(task),
        metrics=TaskFailure(stage=part.stage, reason=part.reason, attempts=part.attempts),
    )


def clear_failure(store: Store, name: str) -> None:
    """Forget the failure of a task, which has succeeded."""
    store.delete(failed_prefix(name))


def clear_outdated(store: Store, parts: Mapping[str, FailedPart]) -> None:
    """Forget failures that do not count any more: those of tasks that have been changed since."""
    for key in records.record_keys(store, FAILED):
        prefix = records.prefix_of(key)
        if prefix.removeprefix(f"{FAILED}/") not in parts:
            store.delete(prefix)


def _identity(task: TaskConfig) -> JsonObject:
    return {"task": task.model_dump(mode="json")}


def missing_parts(
    store: Store, experiment: Experiment, failed: Mapping[str, FailedPart] | None = None
) -> list[FailedPart]:
    """The tasks that are missing, in the order of the experiment, with the reasons.

    failed: the failures by task; default: those that the store has. Raises UserError if the shared
    mask was made with other settings.
    """
    known = failures(store, experiment) if failed is None else failed
    mask = find_shared_mask(store, experiment) if experiment.shares_mask else None
    states = vector_states(experiment, mask)
    parts = []
    for task in experiment.every_task:
        part, state = known.get(task.name), states.get(task.name)
        if state is not None:
            if state.is_current and (part is None or part.stage not in AFTER_VECTOR):
                continue
            part = part or FailedPart(task.name, "", _why_missing(state))
        elif part is not None:
            part = replace(part, reason=part.reason + _consequence(experiment, task))
        if part is not None:
            parts.append(part)
    return parts


def _why_missing(state: VectorState) -> str:
    """Why a task without a recorded failure has no vector that can be used."""
    if state.vector is None:
        return "no vector yet: run `raytvb finetune`"
    reasons = "; ".join(state.differing)
    return f"its vector is not the one that is asked for ({reasons}): run `raytvb finetune`"


def _consequence(experiment: Experiment, task: TaskConfig) -> str:
    """What is not measured without this control or unseen task."""
    is_control = experiment.control is not None and task.name == experiment.control.name
    return f" ({'negation' if is_control else 'this unseen task'} is not measured)"


def without(experiment: Experiment, parts: Sequence[FailedPart]) -> Experiment:
    """The experiment without the tasks that are missing."""
    names = {part.name for part in parts}
    return experiment.restricted({task.name for task in experiment.every_task} - names)


def there_of(experiment: Experiment, parts: Sequence[FailedPart]) -> str:
    """How many of the tasks are there, as in `2 of 3 tasks`."""
    names = {part.name for part in parts} & set(experiment.task_names)
    total = len(experiment.tasks)
    return f"{total - len(names)} of {total} tasks"


def built_from(experiment: Experiment, parts: Sequence[FailedPart]) -> str:
    """One line: how many tasks the results are built from, and what is missing."""
    missing = "; ".join(map(str, parts))
    return f"built from {there_of(experiment, parts)}; missing: {missing}"


def raise_missing(
    store: Store,
    experiment: Experiment,
    parts: Sequence[FailedPart] | None = None,
) -> None:
    """Raise PartialRunError if something is missing.

    parts: what is missing; default: as the store says.
    """
    missing = missing_parts(store, experiment) if parts is None else parts
    if not missing:
        return
    count = there_of(experiment, missing)
    left = len(without(experiment, missing).tasks)
    if left < min(2, len(experiment.tasks)):
        message = (
            f"only {count} can be used, and bases need two: the later stages were skipped. Missing:"
        )
        raise PartialRunError(message, missing, has_results=False)
    raise PartialRunError(f"all the rest is done, with {count}. Missing:", missing)
