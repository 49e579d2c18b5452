"""The identity of each stored thing: everything that it depends on, as plain JSON values.

An identity belongs to a thing, not to the store. A vector depends on the pretrained model, its
mask, and its own task and training settings. A basis depends on the vectors and on how it is
fitted. So the list of tasks is no part of an identity: a store grows. What a thing was made of is
among the parents in its record, by checksums.

A stored thing is used again only if its identity is still the one in its record, and its parents
are still there.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import JsonValue

from raytvb.experiment.basis_specs import BasisSpec
from raytvb.experiment.config import Experiment
from raytvb.experiment.sections.tasks import TRAINING, TaskConfig
from raytvb.storage.contract import JsonObject

_SHARED = "mask_tasks"
"""Field of vectors of format 1: the tasks of the shared mask, which do not count."""


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


def vector_settings(identity: JsonObject) -> JsonObject:
    """The identity of a vector in the form in which two of them are compared.

    The training settings that the task gives itself take the place of those of the experiment. So
    it does not matter where a setting is given.
    """
    task, finetune = _copied(identity, "task"), _copied(identity, "finetune")
    finetune["seed"] = identity.get("seed")
    for field in TRAINING:
        value = task.pop(field, None)
        if value is not None:
            finetune[field] = value
    settings: JsonObject = {**identity, "task": task, "finetune": finetune}
    settings.pop(_SHARED, None)
    if not _has_own_mask(identity):
        settings.pop("seed", None)  # it is that of the fine-tune; a shared mask is a parent
    return settings


def _has_own_mask(identity: JsonObject) -> bool:
    """Whether the vector was trained on a mask of its own, which depends on the seed, too."""
    talos = identity.get("talos")
    return isinstance(talos, dict) and talos.get("mask") == "per-task" and talos.get("density") != 1


def twin_identity(experiment: Experiment, task: TaskConfig) -> JsonObject:
    """Identity of a vector's prepared twin, from which bases are made instead of the vector."""
    return {**vector_identity(experiment, task), "prepare": experiment.basis.prepare}


def twin_settings(identity: JsonObject) -> JsonObject:
    """What a twin depends on beside its vector, which is its parent."""
    return {name: identity.get(name) for name in ("prepare", "seed")}


def mask_identity(experiment: Experiment, tasks: Sequence[TaskConfig]) -> JsonObject:
    """Identity of a mask made from the scores of the given tasks."""
    identity = _sections(experiment, "model", "seed", "talos")
    identity["tasks"] = [task.model_dump(mode="json") for task in tasks]
    return identity


def mask_settings(identity: JsonObject) -> JsonObject:
    """The identity of a mask without the tasks that it was scored on."""
    return {name: value for name, value in identity.items() if name != "tasks"}


def own_mask_settings(identity: JsonObject) -> JsonObject:
    """The identity of a task's own mask in the form in which two of them are compared.

    How the task is trained does not count.
    """
    tasks = identity.get("tasks")
    described: list[JsonValue] = []
    for task in tasks if isinstance(tasks, list) else ():
        described.append(data_settings(task) if isinstance(task, dict) else task)
    return {**identity, "tasks": described}


def data_settings(task: JsonObject) -> JsonObject:
    """The fields of a stored task that say which images and classes it has."""
    return {name: value for name, value in task.items() if name not in TRAINING}


def basis_identity(experiment: Experiment, spec: BasisSpec) -> JsonObject:
    """Identity of a basis: how it is fitted. The vectors are parents in its record."""
    identity: JsonObject = {"method": spec.method, "size": spec.size, "seed": experiment.seed}
    if spec.online:
        identity["online"] = {"buffer": experiment.basis.buffer}
    if experiment.basis.prepare != "none":
        identity["prepare"] = experiment.basis.prepare
    return identity


def basis_settings(identity: JsonObject) -> JsonObject:
    """The identity of a basis in the form in which two of them are compared.

    Records of earlier formats have more fields, on which only the vectors depend.
    """
    names = ("method", "size", "seed", "online", "prepare")
    return {name: identity[name] for name in names if name in identity}


def _copied(identity: JsonObject, field: str) -> JsonObject:
    value = identity.get(field)
    return dict(value) if isinstance(value, dict) else {}


def _sections(experiment: Experiment, *fields: str) -> JsonObject:
    """These fields of the experiment's own identity, and how images are read if not as usual."""
    identity = experiment.identity()
    return {field: identity[field] for field in ("data", *fields) if field in identity}
