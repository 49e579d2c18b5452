"""The basis actor, and the actors that share the coordinates."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError
from torch import Tensor

from raytvb.bases.builder import BasisBuilder
from raytvb.bases.messages import CacheUse, FilesByFolder, Outputs, Versions
from raytvb.bases.shards import CoordinateShard
from raytvb.errors import VectorError
from raytvb.experiment.config import Experiment
from raytvb.orchestration.ray_tasks import patiently
from raytvb.storage.basis_layout import Layout


class ShardGroup:
    """Several actors that each hold a share of the coordinates, as if they were one
    `CoordinateShard`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Takes the names of the actors: a handle among the arguments of an actor would have to
        outlive its restarts.
        """
        self._names = list(names)

    @cached_property
    def _actors(self) -> list[Any]:
        return [ray.get_actor(name) for name in self._names]

    def _on_all(self, method: str, *args: Any) -> list[Any]:
        """The same call to all actors at once; raises what one of them raises."""

        def call() -> list[Any]:
            pending = [getattr(actor, method).remote(*args) for actor in self._actors]
            answers: list[Any] = ray.get(pending)
            return answers

        try:
            return patiently(call)
        except RayTaskError as error:
            raise error.cause from None

    def fetch(self, versions: Versions) -> dict[str, VectorError]:
        """By task, the errors of vectors that one of the actors could not use."""
        failed: dict[str, VectorError] = {}
        for failures in self._on_all("fetch", versions):
            failed.update(failures)
        return failed

    def rows(self, versions: Versions, new: int) -> Tensor:
        """Inner products of all segments."""
        return torch.cat(self._on_all("rows", versions, new))

    def atoms_gram(self, source: str | None, versions: Versions) -> Tensor:
        """Gram matrices of all segments."""
        return torch.cat(self._on_all("atoms_gram", source, versions))

    def write(
        self, outputs: Outputs, versions: Versions, source: str | None = None
    ) -> FilesByFolder:
        """All files of each output."""
        written: FilesByFolder = {folder: {} for folder, _ in outputs}
        for share in self._on_all("write", outputs, versions, source):
            for folder, files in share.items():
                written[folder].update(files)
        return written

    def cache(self) -> CacheUse:
        """Where the first actor has its cache, and the bytes of all."""
        caches: list[CacheUse] = self._on_all("cache")
        return CacheUse(caches[0].kind, sum(cache.bytes for cache in caches))

    def layout(self, versions: Versions) -> Layout:
        """The coordinates, as the index of a basis lists them."""
        layout: Layout = self._on_all("layout", versions)[0]
        return layout


def basis_actors(experiment: Experiment) -> tuple[Any, list[Any]]:
    """The basis actor, and all actors that are to be killed when it is not needed any more.

    They ask for no CPU: all CPUs are for fine-tunes. What they know is in the store, so they may
    die and are restarted.
    """
    count, prefix = experiment.resources.shards, f"raytvb-{experiment.name}-{uuid.uuid4().hex[:8]}"
    names = [f"{prefix}-shard-{number}" for number in range(count)] if count > 1 else []
    shards = []
    for number, name in enumerate(names):
        shards.append(_actor(name, experiment, CoordinateShard, experiment, number, count))
    group = ShardGroup(names) if names else None
    builder = _actor(f"{prefix}-basis", experiment, BasisBuilder, experiment, group)
    return builder, [builder, *shards]


def _actor(name: str, experiment: Experiment, body: type, *args: Any) -> Any:
    """A named actor that Ray restarts where it dies.

    Actors are spread over the nodes: shares of the coordinates on one node would compete for its
    disk and memory.
    """
    retries = experiment.resources.max_retries
    options = {
        "name": name,
        "num_cpus": 0,
        "max_restarts": retries,
        "max_task_retries": retries,
        "scheduling_strategy": "SPREAD",
    }
    return ray.remote(body).options(**options).remote(*args)
