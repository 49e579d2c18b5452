"""Turns plain functions into Ray tasks, and waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from raytvb.errors import UserError, VectorError
from raytvb.experiment.config import Experiment
from raytvb.orchestration.failures import Failure, TransientError, failure_of, stage_error
from raytvb.orchestration.task_memory import task_memory
from raytvb.storage.store_errors import StoreKeyError, reason_of

WAIT_S = 1.0
"""How long a single wait for results lasts. Between waits, Ctrl-C and other events are noticed."""

GRACE_S = 20.0
"""How long tasks have for their end after the run is interrupted. Cluster managers that send
SIGTERM kill what is left after 30 seconds, and Ray needs some of these for its own end."""

Result = TypeVar("Result")


def _marking_transient_errors(
    function: Callable[..., Any], experiment: Experiment
) -> Callable[..., Any]:
    """The function, changed to raise TransientError if the storage or the network fails.

    An error that the user must correct (a missing key, a wrong setting) is raised unchanged, for
    to run the task again would not help.
    """

    resources = experiment.resources

    def call(*args: Any) -> Any:
        resources.apply_to_storage()
        try:
            return function(*args)
        except (StoreKeyError, UserError, VectorError):
            raise
        except (OSError, ConnectionError) as error:
            raise TransientError(reason_of(error)) from error

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
    return as_task(_marking_transient_errors(function, experiment)).options(
        num_cpus=resources.cpus_per_task,
        num_gpus=gpus,
        memory=task_memory(experiment, gpus),
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


def _ignore(name: str, result: Any) -> None:
    """Do nothing with a result."""


def collect(
    experiment: Experiment,
    pending: Mapping[Any, str],
    done: Callable[[str, Any], None] = _ignore,
    idle: Callable[[], None] | None = None,
    *,
    saves: bool = False,
) -> dict[str, Failure]:
    """Wait for all tasks of `ray_task`. Returns the failure of each that failed, by its name.

    pending: the name of each task, by its reference. done: called with the name and the result of
    each task that succeeds, as it ends. idle: called at least once a second. saves: whether the
    tasks save their work when they are interrupted; they are then told so. The failure of one task
    does not stop the others.
    """
    waiting, failed = dict(pending), dict[str, Failure]()
    with _cancelled_on_interruption(waiting) if saves else nullcontext():
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=WAIT_S)
            for reference in ready:
                name = waiting.pop(reference)
                try:
                    result = ray.get(reference)
                except (RayTaskError, RayError) as error:
                    failed[name] = failure_of(error, experiment.resources.max_retries)
                else:
                    done(name, result)
            if idle is not None:
                idle()
    return failed


@contextmanager
def _cancelled_on_interruption(waiting: Collection[Any]) -> Iterator[None]:
    """If the work in this context is interrupted, cancel the tasks with these references.

    A task that has not started is never started. One that runs gets a KeyboardInterrupt, at which a
    fine-tune saves a checkpoint. GRACE_S seconds are left for that. Tasks that save nothing are
    not cancelled: they end with the driver, and Ray ends the whole driver, with a C++ stack, if a
    task is cancelled in the moment in which it completes.
    """
    try:
        yield
    except KeyboardInterrupt:
        references = list(waiting)
        for reference in references:
            ray.cancel(reference)
        if references:
            ray.wait(references, num_returns=len(references), timeout=GRACE_S, fetch_local=False)
        raise


def result_of(experiment: Experiment, reference: Any, stage: str, name: str) -> Any:
    """The result of one task. Raises UserError that names the stage and the task if it fails."""
    while not ray.wait([reference], timeout=WAIT_S)[0]:
        continue
    try:
        return ray.get(reference)
    except (RayTaskError, RayError) as error:
        failure = failure_of(error, experiment.resources.max_retries)
        raise stage_error(stage, {name: failure}) from error
