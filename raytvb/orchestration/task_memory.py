"""How much memory Ray reserves for a task, so that no more run at once than a node can hold."""

from __future__ import annotations

import ray

from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import base_identity
from raytvb.experiment.layout import BASE
from raytvb.experiment.metrics import BaseMetrics
from raytvb.storage import records
from raytvb.storage.store import Store

GB = 1_000_000_000

PROCESS_GB = 0.5
"""A worker that has imported torch and open_clip."""

CPU_BYTES = 16
"""Bytes for each parameter of the image tower on a CPU: weights, gradients and the two moments of
AdamW, in float32. An evaluation needs less: the weights, and two vectors to merge."""

GPU_BYTES = 8
"""The same for a task on a GPU: the weights, and a copy while they are loaded."""


def task_memory(experiment: Experiment, gpus: float) -> int:
    """The bytes that Ray is to reserve for a task on so many GPUs.

    By default this is an estimate: PROCESS_GB, and CPU_BYTES or GPU_BYTES for each parameter of the
    image tower. It is never more than any node has that is large enough otherwise, so that the
    estimate excludes no node. It is 0 as long as the store has no model.
    """
    resources = experiment.resources
    if resources.memory_gb_per_task is not None:
        return int(resources.memory_gb_per_task * GB)
    parameters = _parameters(experiment)
    if not parameters:
        return 0
    estimate = PROCESS_GB * GB + parameters * (GPU_BYTES if gpus else CPU_BYTES)
    return int(min(estimate, _least_memory(resources.cpus_per_task, gpus)))


def _parameters(experiment: Experiment) -> int:
    """Number of parameters of the image tower; 0 if the store has no model yet."""
    store = Store(experiment.store)
    record = records.find(store, BASE, base_identity(experiment))
    if record is None:
        return 0
    return record.metrics_as(BaseMetrics, store.where(BASE)).parameters


def _least_memory(cpus: float, gpus: float) -> float:
    """The least memory, in bytes, of the nodes that have so many CPUs and GPUs; 0 without any."""
    amounts = []
    for node in ray.nodes():
        has = node["Resources"]
        if node["Alive"] and has.get("CPU", 0.0) >= cpus and has.get("GPU", 0.0) >= gpus:
            amounts.append(float(has.get("memory", 0.0)))
    return min(amounts, default=0.0)
