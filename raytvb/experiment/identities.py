"""The identity of each stored thing: all that it depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytvb.experiment.basis_specs import BasisSpec
from raytvb.experiment.config import Experiment
from raytvb.experiment.tasks import TaskConfig


def base_identity(experiment: Experiment) -> dict[str, Any]:
    """Identity of the pretrained model."""
    return {"model": experiment.model.model_dump(mode="json")}


def vector_identity(experiment: Experiment, task: TaskConfig) -> dict[str, Any]:
    """Identity of a task vector: with a shared mask it depends on all tasks, else on its own
    alone.
    """
    identity = experiment.identity()
    chosen = {k: identity[k] for k in ("model", "seed", "talos", "finetune")} | {
        "task": task.model_dump(mode="json")
    }
    shared = experiment.talos.mask == "shared" and experiment.talos.density < 1.0
    return chosen | ({"mask_tasks": list(experiment.task_names)} if shared else {})


def prepared_identity(experiment: Experiment, task: TaskConfig) -> dict[str, Any]:
    """Identity of a vector's prepared twin."""
    return vector_identity(experiment, task) | {"prepare": experiment.basis.prepare}


def mask_identity(experiment: Experiment, tasks: Sequence[TaskConfig]) -> dict[str, Any]:
    """Identity of a mask made from the scores of the given tasks."""
    identity = experiment.identity()
    return {k: identity[k] for k in ("model", "seed", "talos")} | {
        "tasks": [t.model_dump(mode="json") for t in tasks]
    }


def basis_identity(experiment: Experiment, spec: BasisSpec) -> dict[str, Any]:
    """Identity of a basis: that of all vectors, and how it was made."""
    identity = experiment.identity()
    made: dict[str, Any] = {"method": spec.method, "size": spec.size}
    if spec.online:
        made["online"] = {"buffer": experiment.basis.buffer}
    if experiment.basis.prepare != "none":
        made["prepare"] = experiment.basis.prepare
    return {k: identity[k] for k in ("model", "seed", "talos", "finetune", "tasks")} | made
