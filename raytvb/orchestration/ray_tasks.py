"""Turns plain functions into Ray tasks, waits for them, and explains how they failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.storage.store_errors import StoreKeyError

WAIT_S = 1.0
"""How long a single wait for results lasts. Between waits, Ctrl-C and other events are noticed."""

Result = TypeVar("Result")


class TransientError(Exception):
    """The storage or the network failed in a way that may pass, so Ray runs the task again."""


def _marking_transient_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, changed to raise TransientError if the storage or the network fails.

    An error that the user must correct (a missing key, a wrong setting) is raised unchanged, for
    to run the task again would not help.
    """

    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except (StoreKeyError, UserError):
            raise
        except (OSError, ConnectionError) as error:
            raise TransientError(str(error)) from error

    call.__name__ = function.__name__
    return call


def ray_task(
    function: Callable[..., Any], experiment: Experiment, *, gpu: bool = True, results: int = 1
) -> Any:
    """The function as a Ray task with the experiment's resources and retries; call it with
    `.remote(...)`.

    gpu: the task takes the experiment's share of a GPU. Its worker then ends with the task: it
    could not move to another GPU, and its GPU memory is freed. A worker without a GPU is used
    again, which saves importing torch. results: how many references a call returns.
    """
    resources = experiment.resources
    gpus = resources.gpus_per_task if gpu else 0.0
    remote: Any = ray.remote  # Ray's own types lack lists of exceptions to retry
    as_task = remote(
        max_calls=1 if gpus else 0,
        max_retries=resources.max_retries,
        retry_exceptions=[TransientError],
    )
    return as_task(_marking_transient_errors(function)).options(
        num_cpus=resources.cpus_per_task,
        num_gpus=gpus,
        name=function.__name__,
        num_returns=results,
    )


def ray_array_task(
    function: Callable[..., Any], experiment: Experiment, *, gpu: bool = True
) -> Any:
    """Like `ray_task`, for results that stay in the workers' memory.

    `.remote(...)` returns two references, to a status and to the result. To get the status raises
    what the task raised, and moves no data to the driver.
    """

    def call(*args: Any) -> tuple[None, Any]:
        return None, function(*args)

    call.__name__ = function.__name__
    return ray_task(call, experiment, gpu=gpu, results=2)


def patiently(call: Callable[[], Result], attempts: int = 30) -> Result:
    """The result of a call to actors, repeated once a second while one of them is being restarted.

    A repeated call must have the same effect as a single one.
    """
    for attempt in range(attempts):
        try:
            return call()
        except ActorUnavailableError:
            # Ray raises this if the actor's node has just died, whatever max_task_retries is.
            if attempt == attempts - 1:
                raise
            time.sleep(1.0)
    raise AssertionError("unreachable")


def explain(error: BaseException) -> str:
    """What went wrong in a worker, in one line, without Ray's traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, UserError | TransientError | ValueError | OSError):
        return str(cause)
    if isinstance(error, RayTaskError) or not isinstance(error, RayError):
        return f"{type(cause).__name__}: {cause}"
    return str(error).strip().splitlines()[0]


def _ignore(name: str, result: Any) -> None:
    """Do nothing with a result."""


def collect(
    pending: Mapping[Any, str],
    done: Callable[[str, Any], None] = _ignore,
    idle: Callable[[], None] | None = None,
) -> dict[str, str]:
    """Wait for all tasks. Returns the reason of each task that failed, by its name.

    pending: the name of each task, by its reference. done: called with the name and the result of
    each task that succeeds, as it ends. idle: called at least once a second. The failure of one
    task does not stop the others.
    """
    waiting, failed = dict(pending), dict[str, str]()
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=WAIT_S)
        for reference in ready:
            name = waiting.pop(reference)
            try:
                result = ray.get(reference)
            except (RayTaskError, RayError) as error:
                failed[name] = explain(error)
            else:
                done(name, result)
        if idle is not None:
            idle()
    return failed


def result_of(reference: Any, stage: str, name: str) -> Any:
    """The result of one task. Raises UserError that names the stage and the task if it fails."""
    while not ray.wait([reference], timeout=WAIT_S)[0]:
        continue
    try:
        return ray.get(reference)
    except (RayTaskError, RayError) as error:
        raise stage_error(stage, {name: explain(error)}) from error


def stage_error(stage: str, failed: Mapping[str, str]) -> UserError:
    """The error of a stage in which some tasks failed: their reasons, and what the user can do."""
    lines = "".join(f"\n  {name}: {reason}" for name, reason in sorted(failed.items()))
    return UserError(
        f"{stage} failed for {len(failed)} of its parts, the rest is done and kept:{lines}\n"
        f"Once the cause is removed, run the same command again to go on."
    )


def raise_failed(stage: str, failed: Mapping[str, str]) -> None:
    """Raise UserError if tasks of a stage failed."""
    if failed:
        raise stage_error(stage, failed)
