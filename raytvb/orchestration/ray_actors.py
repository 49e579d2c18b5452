"""The basis actor, and the shard actors that divide the coordinates among themselves."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
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
from raytvb.storage.basis_writer import NO_TAGS


class ShardGroup:
    """Several actors, each with a share of the coordinates, with the methods of one
    `CoordinateShard`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """names: of the actors. The group is an argument of the basis actor, which may restart; a
        name finds its actor again afterwards, a handle might not.
        """
        self._names = list(names)

    @cached_property
    def _actors(self) -> list[Any]:
        return [ray.get_actor(name) for name in self._names]

    def _on_all(self, method: str, *args: Any) -> list[Any]:
        """Make the same call to all actors at once. Raises what one of them raises."""

        def call() -> list[Any]:
            pending = [getattr(actor, method).remote(*args) for actor in self._actors]
            answers: list[Any] = ray.get(pending)
            return answers

        try:
            return patiently(call)
        except RayTaskError as error:
            raise error.cause from None

    def fetch(self, versions: Versions) -> dict[str, VectorError]:
        """The errors of the vectors that one of the actors could not use, by task."""
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
        self,
        outputs: Outputs,
        versions: Versions,
        source: str | None = None,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> FilesByFolder:
        """All files of each output."""
        written: FilesByFolder = {folder: {} for folder, _ in outputs}
        for share in self._on_all("write", outputs, versions, source, dict(tags)):
            for folder, files in share.items():
                written[folder].update(files)
        return written

    def cache(self) -> CacheUse:
        """The kind of cache of the first actor, and the bytes in the caches of all actors."""
        caches: list[CacheUse] = self._on_all("cache")
        return CacheUse(caches[0].kind, sum(cache.bytes for cache in caches))

    def layout(self, versions: Versions) -> Layout:
        """The coordinates, as the index of a basis lists them."""
        layout: Layout = self._on_all("layout", versions)[0]
        return layout


def basis_actors(experiment: Experiment) -> tuple[Any, list[Any]]:
    """The basis actor, and a list of all actors to kill when the basis actor is no longer needed.

    The actors ask for no CPU, so that all CPUs are left to fine-tunes. All that they know is in the
    store, so Ray can restart an actor that died.
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
    """A named actor that Ray restarts if it dies.

    Ray spreads the actors over the nodes. Several shards on one node would compete for its disk and
    memory.
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
