"""The one place where plain functions and classes become Ray tasks and actors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from raytvb import workers
from raytvb.basis_actor import BasisBuilder
from raytvb.candidates import Candidate
from raytvb.config import Experiment
from raytvb.errors import UserError
from raytvb.evaluate import Evaluator
from raytvb.store import StoreKeyError

Refs = tuple[tuple[str, Any], ...]  # (task, object reference of its evaluation split)


class TransientError(Exception):
    """The storage or network failed in a way that may pass: Ray runs the task again."""


def _transient_to_retry(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let Ray repeat a call whose storage failed, but not one that was asked for something impossible."""

    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except (StoreKeyError, UserError):
            raise
        except (OSError, ConnectionError) as error:
            raise TransientError(str(error)) from error

    call.__name__ = function.__name__
    return call


def task(function: Callable[..., Any], experiment: Experiment, results: int = 1) -> Any:
    """`function` as a Ray task with the experiment's resources and retries; call it with `.remote(...)`.

    A GPU worker ends with its task, which frees the GPU's memory; a CPU worker is reused, which saves importing torch.
    """
    asked = experiment.resources
    wrap = ray.remote(max_calls=1 if asked.gpus_per_task else 0, max_retries=asked.max_retries,
                      retry_exceptions=[TransientError])
    return wrap(_transient_to_retry(function)).options(num_cpus=asked.cpus_per_task, num_gpus=asked.gpus_per_task,
                                                       name=function.__name__, num_returns=results)


def array_task(function: Callable[..., Any], experiment: Experiment) -> Any:
    """Like `task`, for results that the driver must not fetch: `.remote(...)` gives (status, result) references.

    Getting the status raises what the task raised, and costs nothing.
    """
    def call(*args: Any) -> tuple[None, Any]:
        return None, function(*args)

    call.__name__ = function.__name__
    return task(call, experiment, results=2)


def basis_actor(experiment: Experiment) -> Any:
    """The streaming actor. It needs no CPU of its own: the fine-tunes get them all; its state is in the store."""
    retries = experiment.resources.max_retries
    actor = ray.remote(BasisBuilder).options(num_cpus=0, max_restarts=retries, max_task_retries=retries)
    return actor.remote(experiment)


def explain(error: BaseException) -> str:
    """What went wrong in a worker, in one line, without Ray's traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, UserError | TransientError | ValueError | OSError):
        return str(cause)
    if isinstance(error, RayTaskError) or not isinstance(error, RayError):
        return f"{type(cause).__name__}: {cause}"
    return str(error).strip().splitlines()[0]


def collect(pending: Mapping[Any, str], done: Callable[[str, Any], None] = lambda name, result: None,
            idle: Callable[[], None] = lambda: None) -> dict[str, str]:
    """Wait for tasks (reference -> name), calling `done(name, result)` as each ends; name -> reason of those failed.

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


@cache
def evaluator(experiment: Experiment, fingerprint: str, refs: Refs) -> Evaluator:
    """The worker's evaluator, built once a process; the images stay in the node's shared memory."""
    workers.worker_setup()
    return workers.make_evaluator(experiment, fingerprint, {name: ray.get(ref) for name, ref in refs})


def search_trial(experiment: Experiment, fingerprint: str, candidate: Candidate, refs: Refs) -> dict[str, Any]:
    """`workers.search_candidate` with the worker's evaluator."""
    return workers.search_candidate(experiment, candidate, evaluator(experiment, fingerprint, refs))


def evaluate_candidate(experiment: Experiment, fingerprint: str, candidate: Candidate, chosen: Mapping[str, float],
                       refs: Refs) -> None:
    """`workers.evaluate_candidate` with the worker's evaluator."""
    workers.evaluate_candidate(experiment, candidate, chosen, evaluator(experiment, fingerprint, refs))


def evaluate_models(experiment: Experiment, fingerprint: str, refs: Refs) -> None:
    """`workers.evaluate_models` with the worker's evaluator."""
    workers.evaluate_models(experiment, evaluator(experiment, fingerprint, refs))


def evaluate_negation(experiment: Experiment, fingerprint: str, candidate: Candidate, index: int, control: str,
                      validation: Refs, test: Refs) -> None:
    """`workers.evaluate_negation` with the worker's evaluators."""
    workers.evaluate_negation(experiment, candidate, index, control, evaluator(experiment, fingerprint, validation),
                              evaluator(experiment, fingerprint, test))
