"""The one place where plain functions and classes become Ray tasks and actors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.storage.store_errors import StoreKeyError


class TransientError(Exception):
    """The storage or network failed in a way that may pass: Ray runs the task again."""


def _transient_to_retry(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let Ray repeat a call whose storage failed, but not one that was asked for something
    impossible.
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
    """`function` as a Ray task with the experiment's resources and retries; call it with
    `.remote(...)`.

    gpu: it asks for the experiment's share of a GPU. Such a worker ends with its task: it could not
    move to another GPU, and this frees the memory. A CPU worker is reused, which saves importing
    torch.
    """
    asked = experiment.resources
    gpus = asked.gpus_per_task if gpu else 0.0
    wrap = ray.remote(
        max_calls=1 if gpus else 0, max_retries=asked.max_retries, retry_exceptions=[TransientError]
    )
    return wrap(_transient_to_retry(function)).options(
        num_cpus=asked.cpus_per_task, num_gpus=gpus, name=function.__name__, num_returns=results
    )


def ray_array_task(
    function: Callable[..., Any], experiment: Experiment, *, gpu: bool = True
) -> Any:
    """Like `ray_task`, for results that the driver must not fetch: `.remote(...)` gives (status,
    result) references.

    Getting the status raises what the task raised, and costs nothing.
    """

    def call(*args: Any) -> tuple[None, Any]:
        return None, function(*args)

    call.__name__ = function.__name__
    return ray_task(call, experiment, gpu=gpu, results=2)


def patiently(call: Callable[[], Any], attempts: int = 30) -> Any:
    """A call to actors that change nothing when they are asked twice, again while one of them is
    being restarted.
    """
    for attempt in range(attempts):
        try:
            return call()
        except (
            ActorUnavailableError
        ):  # raised where its node died just now, whatever max_task_retries is
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


def collect(
    pending: Mapping[Any, str],
    done: Callable[[str, Any], None] = lambda name, result: None,
    idle: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Wait for tasks (reference -> name), calling `done(name, result)` as each ends; name -> reason
    of those failed.

    `idle` is called at least once a second. One failure does not stop the others.
    """
    waiting, failed = dict(pending), dict[str, str]()
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=1.0)
        for reference in ready:
            name = waiting.pop(reference)
            try:
                result = ray.get(reference)
            except (RayTaskError, RayError) as error:
                failed[name] = explain(error)
            else:
                done(name, result)
        idle()
    return failed
