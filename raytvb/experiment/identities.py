"""The identity of each stored thing: everything that it depends on, as plain JSON values.

A stored thing is used again only if its identity is still the one in its record.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pydantic import JsonValue

from raytvb.experiment.basis_specs import BasisSpec
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import SHARED_MASK, mask_prefix
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.storage.contract import JsonObject
from raytvb.storage.records import Record, check_identity, differences, find
from raytvb.storage.store import Store

_MASK_TASKS = "mask_tasks"


def base_identity(experiment: Experiment) -> JsonObject:
    """Identity of the pretrained model."""
    return {"model": experiment.model.model_dump(mode="json")}


def vector_identity(experiment: Experiment, task: TaskConfig) -> JsonObject:
    """Identity of a task vector.

    It names no other task. The mask that the vector was trained on is a parent in its record.
    """
    identity = _sections(experiment, "model", "seed", "talos", "finetune")
    identity["task"] = task.model_dump(mode="json")
    return identity


def as_recorded(identity: JsonObject, recorded: JsonObject) -> JsonObject:
    """The identity of a vector, with what its record holds in addition.

    Records of format 1 list the tasks of the shared mask. This list does not count.
    """
    if _MASK_TASKS not in recorded:
        return identity
    return {**identity, _MASK_TASKS: recorded[_MASK_TASKS]}


def twin_identity(experiment: Experiment, task: TaskConfig) -> JsonObject:
    """Identity of a vector's prepared twin, from which bases are made instead of the vector."""
    return {**vector_identity(experiment, task), "prepare": experiment.basis.prepare}


def mask_identity(experiment: Experiment, tasks: Sequence[TaskConfig]) -> JsonObject:
    """Identity of a mask made from the scores of the given tasks."""
    identity = _sections(experiment, "model", "seed", "talos")
    identity["tasks"] = [task.model_dump(mode="json") for task in tasks]
    return identity


def basis_identity(experiment: Experiment, spec: BasisSpec) -> JsonObject:
    """Identity of a basis: what all its vectors depend on, and how the basis was made."""
    identity = _sections(experiment, "model", "seed", "talos", "finetune", "tasks")
    identity["method"] = spec.method
    identity["size"] = spec.size
    if spec.online:
        identity["online"] = {"buffer": experiment.basis.buffer}
    if experiment.basis.prepare != "none":
        identity["prepare"] = experiment.basis.prepare
    return identity


def covers_other_tasks(
    recorded: JsonObject, identity: JsonObject, missing: Collection[str]
) -> bool:
    """Whether a thing was made from fewer or more tasks of the same experiment, all else equal.

    Args:
        recorded: the identity of the thing. Its `tasks` are the tasks that it was made from.
        identity: the identity that it should have.
        missing: names of the experiment's other tasks.
    """
    ours, theirs = _tasks_by_name(recorded), _tasks_by_name(identity)
    others = ours.keys() - theirs.keys()
    if not ours or ours.keys() == theirs.keys() or not others <= set(missing):
        return False
    common = [name for name in theirs if name in ours]
    stored: JsonObject = {**recorded, "tasks": [ours[name] for name in common]}
    requested: JsonObject = {**identity, "tasks": [theirs[name] for name in common]}
    return not differences(stored, requested)


def _tasks_by_name(identity: JsonObject) -> dict[str, JsonValue]:
    """The tasks of an identity, by name."""
    tasks: dict[str, JsonValue] = {}
    listed = identity.get("tasks")
    for task in listed if isinstance(listed, list) else ():
        if isinstance(task, dict) and isinstance(task.get("name"), str):
            tasks[str(task["name"])] = task
    return tasks


def find_of_these_tasks(
    store: Store, prefix: str, identity: JsonObject, missing: Collection[str]
) -> Record | None:
    """The record of a thing; None if there is none, or if it was made from other tasks.

    Arguments as of `covers_other_tasks`. Raises UserError if the identities differ in other ways.
    """
    record = find(store, prefix)
    if record is None or covers_other_tasks(record.identity, identity, missing):
        return None
    check_identity(store, prefix, record, identity)
    return record


def find_shared_mask(store: Store, experiment: Experiment) -> Record | None:
    """The record of the shared mask; None if there is none.

    A mask stays as it is if tasks come or go after it was made. Its identity says on which tasks it
    was scored. Raises UserError if it was made with other settings.
    """
    prefix = mask_prefix(SHARED_MASK)
    record, identity = find(store, prefix), mask_identity(experiment, experiment.tasks)
    if record is None or covers_other_tasks(record.identity, identity, experiment.missing):
        return record
    check_identity(store, prefix, record, identity)
    return record


def _sections(experiment: Experiment, *fields: str) -> JsonObject:
    """These fields of the experiment's own identity, and how images are read if not as usual."""
    identity = experiment.identity()
    return {field: identity[field] for field in ("data", *fields) if field in identity}
