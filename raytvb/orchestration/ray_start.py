"""Starts a Ray on this machine. On a busy machine that can fail, so it is tried three times."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic, sleep
from typing import Any

import psutil
import ray
import tenacity

from raytvb.errors import UserError
from raytvb.orchestration.leftovers import SERVERS, kill

LIMIT_VARIABLE = "RAYTVB_RAY_START_S"
"""Environment variable: the seconds that the first start of Ray may take."""

LIMIT_S = 30.0
"""Default of that limit. It is Ray's own."""

ATTEMPTS = 3
"""How often a start is tried. Every time may take twice as long as the one before."""

RAY_LIMITS = {
    # The time for the global control server to say at which port it listens.
    "RAY_gcs_server_port_wait_time_s": 1.0,
    # The time for the two agents of the node, which are Python processes, to be ready.
    "RAY_agent_register_timeout_ms": 1000.0,
    # The time for a worker, which imports Ray, to be ready.
    "RAY_worker_register_timeout_seconds": 2.0,
}
"""Ray's own limits of the start, in units for each second of ours."""

QUESTION_S = 1.0
"""Seconds that a single question after the nodes may take."""


class StartError(Exception):
    """Ray did not start."""


def start_ray(cpus: int | None, gpus: int | None, tell: Callable[[str], None]) -> None:
    """Start a Ray of this size; None: all that the machine has.

    tell: called with one line before each further try. Raises UserError that says what to do if Ray
    does not start.
    """
    limit = _limit()
    limits = [limit * 2**number for number in range(ATTEMPTS)]

    def tell_again(state: tenacity.RetryCallState) -> None:
        number = state.attempt_number
        reason = _reason(state.outcome.exception() if state.outcome else None)
        tell(f"Ray did not start ({reason}); trying again, for up to {limits[number]:g} s")

    tries = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        retry=tenacity.retry_if_not_exception_type((ValueError, TypeError)),
        before_sleep=tell_again,
        reraise=True,
    )
    try:
        for attempt in tries:
            with attempt:
                _start(cpus, gpus, limits[attempt.retry_state.attempt_number - 1])
    except Exception as error:
        raise UserError(_advice(error, limits[-1])) from error


def _limit() -> float:
    """The seconds for the first start."""
    text = os.environ.get(LIMIT_VARIABLE, str(LIMIT_S))
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise UserError(f"{LIMIT_VARIABLE}={text} is not a number of seconds above 0")
    return limit


def _reason(error: BaseException | None) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _advice(error: Exception, limit_s: float) -> str:
    """What the user can do if Ray does not start."""
    if isinstance(error, ValueError | TypeError):
        return f"Ray cannot be started: {_reason(error)}; check --num-cpus and --num-gpus"
    return (
        f"Ray did not start on this machine in {ATTEMPTS} tries, the last of up to {limit_s:g} s: "
        f"{_reason(error)}\n"
        f"Free CPUs, memory and disk space, use a lower --num-cpus, or set {LIMIT_VARIABLE} to "
        f"more seconds. Or start a cluster (`ray start --head`) and set RAY_ADDRESS to it. Ray's "
        f"own messages are in {os.environ.get('RAY_TMPDIR', '/tmp')}/ray/session_latest/logs"
    )


def _start(cpus: int | None, gpus: int | None, limit_s: float) -> None:
    """Start Ray once. If that fails or is interrupted, no process of it is left."""
    before = set(psutil.Process().children())
    try:
        with _longer_limits(limit_s), _waiting_for_the_node(limit_s):
            ray.init(
                "local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except BaseException:
        with suppress(Exception):
            ray.shutdown()
        _end_children_since(before)
        raise


def _end_children_since(before: set[psutil.Process]) -> None:
    """Kill the children of this process that are not among those, and all processes below."""
    for child in set(psutil.Process().children()) - before:
        with suppress(psutil.Error):
            kill({child, *child.children(recursive=True)})
            child.wait(5.0)


@contextmanager
def _longer_limits(limit_s: float) -> Iterator[None]:
    """Within this context, Ray's limits of the start are at least this long."""
    before = {name: os.environ.get(name) for name in RAY_LIMITS}
    for name, unit in RAY_LIMITS.items():
        least = math.ceil(unit * limit_s)
        os.environ[name] = str(max(least, int(float(before[name] or 0))))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _waiting_for_the_node(limit_s: float) -> Iterator[None]:
    """Within this context, Ray waits this long for its node to register.

    Its own limit is a constant in its code. Here the wait ends early, with StartError, if one of
    the servers has ended.
    """
    services: Any = ray._private.services
    ask, deadline = services.get_node, monotonic() + limit_s

    def get_node(address: str, node: str) -> Any:
        # Ray's own question blocks for 30 seconds, in which this process would notice neither
        # Ctrl-C nor that a server has ended. So it is asked when the answer is there.
        while not _is_registered(address, node):
            _check_servers()
            if monotonic() >= deadline:
                raise StartError(f"its node was not ready after {limit_s:g} s")
            sleep(0.1)
        return ask(address, node)

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = ask


def _is_registered(address: str, node: str) -> bool:
    """Whether the control server at an address knows a node, by its id in hexadecimal digits."""
    raylet: Any = ray._raylet
    try:
        known = raylet.GcsClient(address=address).get_all_node_info(timeout=QUESTION_S)
    except (AttributeError, TypeError):  # another version of Ray
        return True
    except Exception:  # of several kinds: the server does not answer yet
        return False
    return any(each.hex() == node for each in known)


def _check_servers() -> None:
    """Raise StartError if a server of Ray that this process started has ended."""
    for child in psutil.Process().children():
        if child.name() in SERVERS and child.status() == psutil.STATUS_ZOMBIE:
            raise StartError(f"its server {child.name()} ended")
