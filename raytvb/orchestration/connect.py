"""Connects to Ray, and checks before any work that the cluster has what an experiment needs."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.sections.resources import ResourceConfig
from raytvb.orchestration.leftovers import start_guard
from raytvb.orchestration.passed_variables import job_environment
from raytvb.orchestration.progress import Reporter
from raytvb.orchestration.ray_start import start_ray
from raytvb.orchestration.task_memory import GB
from raytvb.storage.local_files import FOLDER

FREE_PATIENCE_S = 10.0
"""How long other work may occupy the resources of a task before that is an error."""

REACH_S = 10.0
"""An address must answer within this time."""

HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The preface of a connection, and an empty frame of settings (RFC 9113, section 3.4)."""

JOIN_TRIES = 2
"""How often Ray asks a cluster that stops answering while it is joined, for some 40 s each."""

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


def connect(
    *,
    cpus: int | None = None,
    gpus: int | None = None,
    retries: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a Ray on this machine for this process.

    In a Ray job, RAY_ADDRESS names the cluster of the job.

    Args:
        cpus, gpus: the size of a Ray that is started here; default: all that the machine has.
        retries: how often Ray repeats a task that it ended because memory ran out; default: without
            end, as Ray does.
        tell: called with a line if a start is tried again, and for what Ray reports. Default: it is
            printed on standard error.

    Raises UserError if the cluster cannot be reached, or if no Ray can be started.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    _set_defaults(RAY_SETTINGS)
    if retries is not None:
        # Read by the process that submits the tasks. The task's own `max_retries` is not for this.
        _set_defaults({"RAY_task_oom_retries": str(retries)})
    tell = tell or Reporter().say
    _shorten_reports(tell)
    with _own_sigterm():
        if address:
            _join(address)
        else:
            _set_defaults(LOCAL_SETTINGS)
            start_guard()
            start_ray(cpus, gpus, tell)


def _shorten_reports(tell: Callable[[str], None]) -> None:
    """Tell only the first line of what Ray reports, such as that it repeats a task.

    Ray prints its reports on standard output, which is for results, some of them in 60 lines.
    """
    worker: Any = ray._private.worker

    def print_first_line(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        lines = "\n".join(data["lines"]).strip().splitlines()
        if lines:
            tell(f"note from Ray: {lines[0]}")

    worker.print_to_stdstream = print_first_line


def _join(address: str) -> None:
    """Join a cluster. Raises UserError if that is not possible."""
    _check_reachable(address)
    variables = {"env_vars": {**job_environment(os.environ), FOLDER: os.getcwd()}}
    _set_defaults({"RAY_gcs_server_port_wait_time_s": str(JOIN_TRIES)})
    try:
        ray.init(runtime_env=variables, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # some of Ray's errors are of no more special type
        raise UserError(
            f"cannot connect to Ray at {address}: {error}\n"
            f"Check RAY_ADDRESS and that the cluster is up (`ray status`), or unset RAY_ADDRESS to "
            f"start a local cluster. A cluster that wants a token needs RAY_AUTH_MODE=token, and "
            f"the token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        ) from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Put this process's handler of SIGTERM back after Ray has replaced it, if there was one.

    Ray's own ends the process with exit code 15, and its C++ code prints a stack trace and aborts.
    """
    handler = signal.getsignal(signal.SIGTERM)
    is_main = threading.current_thread() is threading.main_thread()
    if not callable(handler) or not is_main:
        yield
        return
    try:
        yield
    except SystemExit:
        # Raised by Ray's handler, within `ray.init`.
        handler(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def _set_defaults(settings: dict[str, str]) -> None:
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _check_reachable(address: str) -> None:
    """Raise UserError if nothing answers at host:port. Ray itself would try for 14 minutes.

    Ray's control server speaks HTTP/2, so a healthy one answers a greeting at once. A port that
    takes the connection and says nothing is that of a head which hangs or is overloaded.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return
    try:
        with socket.create_connection((host, int(port)), timeout=REACH_S) as connection:
            connection.sendall(HTTP2_GREETING)
            connection.recv(1)
    except OSError as error:
        raise UserError(
            f"nothing answers at RAY_ADDRESS={address} ({error}): check it and the cluster's head, "
            f"or unset it to start a local cluster"
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
            memory = bool(resources.memory_gb_per_task)
            nodes = "; ".join(_amounts(node, memory) for node in _alive_nodes())
            or_memory = " or resources.memory_gb_per_task" if memory else ""
            raise UserError(
                f"the experiment asks for {_request(resources)}, but no node of the cluster has "
                f"that (nodes: {nodes}). Lower resources.cpus_per_task or resources.gpus_per_task"
                f"{or_memory}, add nodes, or set resources.wait_s to wait for an autoscaler"
            )
        time.sleep(1.0)


def _wait_until_free(resources: ResourceConfig, deadline: float) -> None:
    while not _fits(ray.available_resources(), resources):
        if time.monotonic() >= deadline:
            memory = bool(resources.memory_gb_per_task)
            raise UserError(
                f"the experiment asks for {_request(resources)}, but only "
                f"{_amounts(ray.available_resources(), memory)} of the cluster's "
                f"{_amounts(ray.cluster_resources(), memory)} are free. Wait for the other work to "
                f"end, or set resources.wait_s to wait here"
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
    if resources.memory_gb_per_task:
        bundle["memory"] = resources.memory_gb_per_task * GB
    return bundle


def _some_node_fits(resources: ResourceConfig) -> bool:
    return any(_fits(node, resources) for node in _alive_nodes())


def _fits(available: dict[str, float], resources: ResourceConfig) -> bool:
    return all(available.get(name, 0.0) >= amount for name, amount in _bundle(resources).items())


def _request(resources: ResourceConfig) -> str:
    gigabytes = resources.memory_gb_per_task
    memory = f", with {gigabytes:g} GB of memory," if gigabytes else ""
    return f"{resources.cpus_per_task:g} CPUs and {resources.gpus_per_task:g} GPUs{memory} per task"


def _amounts(resources: dict[str, float], memory: bool = False) -> str:
    """A node's resources. memory: also its memory, without that of Ray's object store."""
    amounts = f"{resources.get('CPU', 0.0):g} CPUs and {resources.get('GPU', 0.0):g} GPUs"
    return f"{amounts} with {resources.get('memory', 0.0) / GB:.1f} GB" if memory else amounts
