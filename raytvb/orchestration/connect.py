"""Connects to Ray, and checks before any work that the cluster has what an experiment needs."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import ray

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.sections.resources import ResourceConfig
from raytvb.orchestration.passed_variables import job_environment

FREE_PATIENCE_S = 10.0
"""How long other work may occupy the resources of a task before that is an error."""

REACH_S = 10.0
"""An address must answer within this time."""

RAY_SETTINGS = {
    # Ray leaves CUDA_VISIBLE_DEVICES as it is for tasks that ask for no GPU. Without this setting
    # it warns that a later version will do so by default.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Tune's newer console output ignores verbose=0.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Threads of one worker that wait by spinning would take the cores from the other workers.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Inside a job, Ray refuses variables that the job itself was given, even with equal values,
    # unless this setting tells it to merge them.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
    # Our code waits for every task and gives the reason of a failure in one line. Ray would add
    # a traceback for every task that depends on the failed one.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}
LOCAL_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Without this setting Ray ends idle workers within a second of Tune's start, and the workers
    # of the next stage import torch again.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}


def connect(*, cpus: int | None = None, gpus: int | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a Ray on this machine for this process.

    In a Ray job, RAY_ADDRESS names the cluster of the job. cpus, gpus: the size of a Ray that is
    started here; default: all that the machine has. Raises UserError if the cluster cannot be
    reached.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    _set_defaults(RAY_SETTINGS)
    _check_reachable(address or "")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(runtime_env={"env_vars": job_environment(os.environ)}, **quiet)
        else:
            _set_defaults(LOCAL_SETTINGS)
            ray.init("local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot connect to Ray at {address or 'a local cluster'}: {error}\n"
            f"Check RAY_ADDRESS, or unset it to start a local cluster. A cluster that wants a "
            f"token needs RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN, "
            f"RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        ) from error


def _set_defaults(settings: dict[str, str]) -> None:
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _check_reachable(address: str) -> None:
    """Raise UserError if nothing listens at host:port. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at RAY_ADDRESS={address} ({error}): check it, or unset it to start a "
            f"local cluster"
        ) from None


def preflight(experiment: Experiment, tell: Callable[[str], None]) -> None:
    """Raise UserError unless some node can hold one task and the cluster has room for it now.

    With `resources.wait_s`, ask the autoscaler for such a node and wait for it. `tell` is called
    with the message that says so.
    """
    resources = experiment.resources
    deadline = time.monotonic() + resources.wait_s
    if not _some_node_fits(resources) and resources.wait_s > 0:
        tell(f"waiting up to {resources.wait_s:g} s for a node with {_request(resources)}")
        _announce(resources)
    _wait_for_a_node(resources, deadline)
    _wait_until_free(resources, max(deadline, time.monotonic() + FREE_PATIENCE_S))


def _announce(resources: ResourceConfig) -> None:
    """Ask the autoscaler for a node that holds one task."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[_bundle(resources)])


def _wait_for_a_node(resources: ResourceConfig, deadline: float) -> None:
    while not _some_node_fits(resources):
        if time.monotonic() >= deadline:
            nodes = "; ".join(_amounts(node) for node in _alive_nodes())
            raise UserError(
                f"the experiment asks for {_request(resources)}, but no node of the cluster has "
                f"that (nodes: {nodes}). Lower resources.cpus_per_task or resources.gpus_per_task, "
                f"add nodes, or set resources.wait_s to wait for an autoscaler"
            )
        time.sleep(1.0)


def _wait_until_free(resources: ResourceConfig, deadline: float) -> None:
    while not _fits(ray.available_resources(), resources):
        if time.monotonic() >= deadline:
            raise UserError(
                f"the experiment asks for {_request(resources)}, but only "
                f"{_amounts(ray.available_resources())} of the cluster's "
                f"{_amounts(ray.cluster_resources())} are free. Wait for the other work to end, or "
                f"set resources.wait_s to wait here"
            )
        time.sleep(0.5)


def slots(experiment: Experiment) -> int:
    """How many tasks of the experiment the cluster's nodes can run at once; at least 1."""
    bundle, count = _bundle(experiment.resources), 0
    for node in _alive_nodes():
        shares = [node.get(name, 0.0) / amount for name, amount in bundle.items()]
        count += int(min(shares) + 1e-9) if shares else 0
    return max(1, count)


def _alive_nodes() -> list[dict[str, float]]:
    """The total resources of each node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _bundle(resources: ResourceConfig) -> dict[str, float]:
    """The resources that one task asks for, under Ray's names."""
    bundle = {}
    if resources.cpus_per_task:
        bundle["CPU"] = resources.cpus_per_task
    if resources.gpus_per_task:
        bundle["GPU"] = resources.gpus_per_task
    return bundle


def _some_node_fits(resources: ResourceConfig) -> bool:
    return any(_fits(node, resources) for node in _alive_nodes())


def _fits(available: dict[str, float], resources: ResourceConfig) -> bool:
    enough_cpus = available.get("CPU", 0.0) >= resources.cpus_per_task
    return enough_cpus and available.get("GPU", 0.0) >= resources.gpus_per_task


def _request(resources: ResourceConfig) -> str:
    return f"{resources.cpus_per_task:g} CPUs and {resources.gpus_per_task:g} GPUs per task"


def _amounts(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0.0):g} CPUs and {resources.get('GPU', 0.0):g} GPUs"
