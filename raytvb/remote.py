"""The one place where plain functions and classes become Ray tasks and actors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import ray
import torch
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from torch import Tensor

from raytvb import workers
from raytvb.basis_actor import BasisBuilder
from raytvb.basis_files import Layout
from raytvb.config import Experiment
from raytvb.connect import slots
from raytvb.errors import UserError
from raytvb.evaluate import Evaluator
from raytvb.evaluations import Evaluation
from raytvb.records import FileInfo
from raytvb.rows import has_rows
from raytvb.shards import CoordinateShard, Known, Outputs
from raytvb.store import Store, StoreKeyError

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


def task(function: Callable[..., Any], experiment: Experiment, *, gpu: bool = True, results: int = 1) -> Any:
    """`function` as a Ray task with the experiment's resources and retries; call it with `.remote(...)`.

    gpu: it asks for the experiment's share of a GPU. Such a worker ends with its task: it could not move to another
    GPU, and this frees the memory. A CPU worker is reused, which saves importing torch.
    """
    asked = experiment.resources
    gpus = asked.gpus_per_task if gpu else 0.0
    wrap = ray.remote(max_calls=1 if gpus else 0, max_retries=asked.max_retries, retry_exceptions=[TransientError])
    return wrap(_transient_to_retry(function)).options(num_cpus=asked.cpus_per_task, num_gpus=gpus,
                                                       name=function.__name__, num_returns=results)


def array_task(function: Callable[..., Any], experiment: Experiment, *, gpu: bool = True) -> Any:
    """Like `task`, for results that the driver must not fetch: `.remote(...)` gives (status, result) references.

    Getting the status raises what the task raised, and costs nothing.
    """
    def call(*args: Any) -> tuple[None, Any]:
        return None, function(*args)

    call.__name__ = function.__name__
    return task(call, experiment, gpu=gpu, results=2)


def patiently(call: Callable[[], Any], attempts: int = 30) -> Any:
    """A call to actors that change nothing when they are asked twice, again while one of them is being restarted."""
    for attempt in range(attempts):
        try:
            return call()
        except ActorUnavailableError:  # raised where its node died just now, whatever max_task_retries is
            if attempt == attempts - 1:
                raise
            time.sleep(1.0)
    raise AssertionError("unreachable")


class ShardGroup:
    """Several actors that each hold a share of the coordinates, as if they were one `CoordinateShard`."""

    def __init__(self, names: Sequence[str]) -> None:
        """Names of the actors: a handle among the arguments of an actor would have to outlive its restarts."""
        self._names = list(names)

    @cached_property
    def _actors(self) -> list[Any]:
        return [ray.get_actor(name) for name in self._names]

    def _each(self, method: str, *args: Any) -> list[Any]:
        """The same call to all of them at once; what one raises is raised here."""
        try:
            return patiently(lambda: ray.get([getattr(actor, method).remote(*args) for actor in self._actors]))
        except RayTaskError as error:
            raise error.cause from None

    def fetch(self, known: Known) -> dict[str, str]:
        """Task to reason for the vectors that one of them could not use."""
        return {task: reason for failed in self._each("fetch", known) for task, reason in failed.items()}

    def rows(self, known: Known, new: int) -> Tensor:
        """Inner products of all segments."""
        return torch.cat(self._each("rows", known, new))

    def atoms_gram(self, source: str | None, known: Known) -> Tensor:
        """Gram matrices of all segments."""
        return torch.cat(self._each("atoms_gram", source, known))

    def write(self, outputs: Outputs, known: Known, source: str | None = None) -> dict[str, dict[str, FileInfo]]:
        """All files of each output."""
        parts = self._each("write", outputs, known, source)
        return {folder: {n: i for part in parts for n, i in part[folder].items()} for folder, _ in outputs}

    def cache(self) -> tuple[str, int]:
        """Where the first of them has its cache, and the bytes of all."""
        found = self._each("cache")
        return found[0][0], sum(size for _, size in found)

    def layout(self, known: Known) -> Layout:
        """The coordinates, as an index tells them."""
        return self._each("layout", known)[0]


def basis_actors(experiment: Experiment) -> tuple[Any, list[Any]]:
    """The streaming actor, and all actors that are to be killed when it is not needed any more.

    They need no CPU of their own: the fine-tunes get them all; what they know is in the store, so they may die.
    """
    retries, run = experiment.resources.max_retries, uuid.uuid4().hex[:8]
    # Spread, for shares of the coordinates on one node would share its disk and memory.
    options = {"num_cpus": 0, "max_restarts": retries, "max_task_retries": retries, "scheduling_strategy": "SPREAD"}

    def actor(name: str, body: type, *args: Any) -> Any:
        return ray.remote(body).options(name=name, **options).remote(*args)

    count = experiment.resources.shards
    names = [f"raytvb-{experiment.name}-{run}-shard-{n}" for n in range(count)] if count > 1 else []
    shards = [actor(name, CoordinateShard, experiment, n, count) for n, name in enumerate(names)]
    builder = actor(f"raytvb-{experiment.name}-{run}-basis", BasisBuilder, experiment,
                    ShardGroup(names) if names else None)
    return builder, [builder, *shards]


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
def evaluator(experiment: Experiment, fingerprint: str, refs: Refs, precision: str) -> Evaluator:
    """The worker's evaluator, built once a process; the images stay in the node's shared memory."""
    workers.worker_setup()
    return workers.make_evaluator(experiment, fingerprint, {name: ray.get(ref) for name, ref in refs}, precision)


@dataclass(frozen=True)
class Service:
    """What evaluations need beside the store: the pretrained model's fingerprint, the images, and how to compute."""

    experiment: Experiment
    fingerprint: str
    splits: Mapping[str, Refs]
    precision: str

    def evaluator(self, split: str) -> Evaluator:
        """The worker's evaluator of a split."""
        return evaluator(self.experiment, self.fingerprint, self.splits[split], self.precision)


def compare_precisions(experiment: Experiment, fingerprint: str, refs: Refs) -> dict[str, Any]:
    """`workers.compare_precisions` on images in Ray's object store."""
    workers.worker_setup()
    return workers.compare_precisions(experiment, fingerprint, {name: ray.get(ref) for name, ref in refs})


def evaluate_group(service: Service, group: Sequence[Evaluation]) -> dict[str, str]:
    """Evaluations one after the other with the worker's evaluators; name -> reason of those that failed."""
    failed = {}
    for each in group:
        try:
            if not has_rows(Store(service.experiment.store), each.name, each.identity):  # it has where this is a retry
                each.function(service.experiment, each.name, each.identity, *each.arguments,
                              *(service.evaluator(s) for s in each.splits))
        except (UserError, ValueError) as error:
            failed[each.name] = str(error)
    return failed


def evaluation_groups(experiment: Experiment, evaluations: Sequence[Evaluation]) -> list[Sequence[Evaluation]]:
    """One a task on CPUs. A GPU task starts a process, so there two groups for each that the cluster holds at once."""
    if not experiment.resources.gpus_per_task:
        return [[e] for e in evaluations]
    count = min(len(evaluations), 2 * slots(experiment))
    return [evaluations[i::count] for i in range(count)]
