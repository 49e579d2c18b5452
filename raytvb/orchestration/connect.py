"""Connecting to Ray, and checking before any work that the cluster has what an experiment asks
for.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable

import ray

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.orchestration.submit import job_environment

FREE_PATIENCE_S = 10.0


REACH_S = 10.0


def connect(*, cpus: int | None = None, gpus: int | None = None) -> None:
    """Join the cluster of RAY_ADDRESS (in a Ray job: the job's own), or start a local one for this
    process.

    `cpus` and `gpus` size a local cluster only. Raises UserError where the cluster cannot be
    reached.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault(
        "RAY_AIR_NEW_OUTPUT", "0"
    )  # Tune's newer console output ignores verbose=0
    # Spinning threads of one worker would take the cores from the others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Inside a job Ray refuses variables that the job was given too, even equal ones, unless it is
    # told to merge them.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    # A failed task is told in one line by who waits for it; Ray would add the traceback of
    # everything that needed it.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    _check_reachable(os.environ.get("RAY_ADDRESS", ""))
    runtime = {"env_vars": job_environment(os.environ)}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(runtime_env=runtime, log_to_driver=False, logging_level=logging.ERROR)
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # Else idle workers are ended within a second of Tune's starting, and the next stage
            # imports torch anew.
            os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = os.environ.get("RAY_ADDRESS", "a local cluster")
        raise UserError(
            f"cannot connect to Ray at {where}: {error}\nCheck RAY_ADDRESS, or unset it to start a local "
            f"cluster. A cluster that wants a token needs RAY_AUTH_MODE=token, and the token in "
            f"RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        ) from error


def _check_reachable(address: str) -> None:
    """Raise UserError where nothing listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at RAY_ADDRESS={address} ({error}): check it, or unset it to start a local "
            f"cluster"
        ) from None


def _fits(resources: dict[str, float], cpus: float, gpus: float) -> bool:
    return resources.get("CPU", 0.0) >= cpus and resources.get("GPU", 0.0) >= gpus


def _feasible(cpus: float, gpus: float) -> bool:
    """Some node has as much in total."""
    return any(n["Alive"] and _fits(n["Resources"], cpus, gpus) for n in ray.nodes())


def slots(experiment: Experiment) -> int:
    """How many GPU tasks of the experiment the cluster's nodes hold at once; at least 1."""
    asked = experiment.resources
    wanted = {k: v for k, v in (("CPU", asked.cpus_per_task), ("GPU", asked.gpus_per_task)) if v}
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    return max(
        1,
        sum(int(min(n.get(k, 0.0) / v for k, v in wanted.items()) + 1e-9) for n in nodes)
        if wanted
        else 1,
    )


def _counts(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0.0):g} CPUs and {resources.get('GPU', 0.0):g} GPUs"


def preflight(experiment: Experiment, tell: Callable[[str], None]) -> None:
    """Raise UserError unless a node can hold one task and has room for it now.

    With `resources.wait_s` the request is announced to the autoscaler and waited for.
    """
    wanted = experiment.resources
    asked = f"{wanted.cpus_per_task:g} CPUs and {wanted.gpus_per_task:g} GPUs per task"
    deadline = time.monotonic() + wanted.wait_s
    if not _feasible(wanted.cpus_per_task, wanted.gpus_per_task) and wanted.wait_s > 0:
        from ray.autoscaler.sdk import request_resources

        tell(f"waiting up to {wanted.wait_s:g} s for a node with {asked}")
        bundle = {"CPU": wanted.cpus_per_task, "GPU": wanted.gpus_per_task}
        request_resources(bundles=[{k: v for k, v in bundle.items() if v}])
    while not _feasible(wanted.cpus_per_task, wanted.gpus_per_task):
        if time.monotonic() >= deadline:
            largest = "; ".join(_counts(n["Resources"]) for n in ray.nodes() if n["Alive"])
            raise UserError(
                f"the experiment asks for {asked}, but no node of the cluster has that (nodes: {largest}). "
                f"Lower resources.cpus_per_task or resources.gpus_per_task, add nodes, or set "
                f"resources.wait_s to wait for an autoscaler"
            )
        time.sleep(1.0)
    deadline = max(deadline, time.monotonic() + FREE_PATIENCE_S)
    while not _fits(ray.available_resources(), wanted.cpus_per_task, wanted.gpus_per_task):
        if time.monotonic() >= deadline:
            raise UserError(
                f"the experiment asks for {asked}, but only {_counts(ray.available_resources())} of the "
                f"cluster's {_counts(ray.cluster_resources())} are free. Wait for the other work to "
                f"end, or set resources.wait_s to wait here"
            )
        time.sleep(0.5)
