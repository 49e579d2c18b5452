"""The identity of each stored thing: everything that it depends on, as plain JSON values.

A stored thing is used again only if its identity is still the one in its record.
"""

from __future__ import annotations

from collections.abc import Sequence

from raytvb.experiment.basis_specs import BasisSpec
from raytvb.experiment.config import Experiment
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.storage.contract import JsonObject


def base_identity(experiment: Experiment) -> JsonObject:
    """Identity of the pretrained model."""
    return {"model": experiment.model.model_dump(mode="json")}


def vector_identity(experiment: Experiment, task: TaskConfig) -> JsonObject:
    """Identity of a task vector.

    With the shared mask, a vector depends on all tasks that were scored for the mask. With a mask
    of its own, or without a mask, it depends on no other task.
    """
    identity = _sections(experiment, "model", "seed", "talos", "finetune")
    identity["task"] = task.model_dump(mode="json")
    if experiment.talos.mask == "shared" and experiment.talos.density < 1.0:
        identity["mask_tasks"] = [*experiment.task_names]
    return identity


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


def _sections(experiment: Experiment, *fields: str) -> JsonObject:
    """These fields of the experiment's own identity."""
    identity = experiment.identity()
    return {field: identity[field] for field in fields}
