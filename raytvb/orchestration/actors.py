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
from raytvb.bases.shards import CoordinateShard, Known, Outputs
from raytvb.experiment.config import Experiment
from raytvb.orchestration.tasks import patiently
from raytvb.storage.basis_layout import Layout
from raytvb.storage.records import FileInfo


class ShardGroup:
    """Several actors that each hold a share of the coordinates, as if they were one
    `CoordinateShard`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Names of the actors: a handle among the arguments of an actor would have to outlive its
        restarts.
        """
        self._names = list(names)

    @cached_property
    def _actors(self) -> list[Any]:
        return [ray.get_actor(name) for name in self._names]

    def _each(self, method: str, *args: Any) -> list[Any]:
        """The same call to all of them at once; what one raises is raised here."""
        try:
            return patiently(
                lambda: ray.get([getattr(actor, method).remote(*args) for actor in self._actors])
            )
        except RayTaskError as error:
            raise error.cause from None

    def fetch(self, known: Known) -> dict[str, str]:
        """Task to reason for the vectors that one of them could not use."""
        return {
            task: reason for failed in self._each("fetch", known) for task, reason in failed.items()
        }

    def rows(self, known: Known, new: int) -> Tensor:
        """Inner products of all segments."""
        return torch.cat(self._each("rows", known, new))

    def atoms_gram(self, source: str | None, known: Known) -> Tensor:
        """Gram matrices of all segments."""
        return torch.cat(self._each("atoms_gram", source, known))

    def write(
        self, outputs: Outputs, known: Known, source: str | None = None
    ) -> dict[str, dict[str, FileInfo]]:
        """All files of each output."""
        parts = self._each("write", outputs, known, source)
        return {
            folder: {n: i for part in parts for n, i in part[folder].items()}
            for folder, _ in outputs
        }

    def cache(self) -> tuple[str, int]:
        """Where the first of them has its cache, and the bytes of all."""
        found = self._each("cache")
        return found[0][0], sum(size for _, size in found)

    def layout(self, known: Known) -> Layout:
        """The coordinates, as an index tells them."""
        return self._each("layout", known)[0]


def basis_actors(experiment: Experiment) -> tuple[Any, list[Any]]:
    """The streaming actor, and all actors that are to be killed when it is not needed any more.

    They need no CPU of their own: the fine-tunes get them all; what they know is in the store, so
    they may die.
    """
    retries, run = experiment.resources.max_retries, uuid.uuid4().hex[:8]
    # Spread, for shares of the coordinates on one node would share its disk and memory.
    options = {
        "num_cpus": 0,
        "max_restarts": retries,
        "max_task_retries": retries,
        "scheduling_strategy": "SPREAD",
    }

    def actor(name: str, body: type, *args: Any) -> Any:
        return ray.remote(body).options(name=name, **options).remote(*args)

    count = experiment.resources.shards
    names = [f"raytvb-{experiment.name}-{run}-shard-{n}" for n in range(count)] if count > 1 else []
    shards = [actor(name, CoordinateShard, experiment, n, count) for n, name in enumerate(names)]
    builder = actor(
        f"raytvb-{experiment.name}-{run}-basis",
        BasisBuilder,
        experiment,
        ShardGroup(names) if names else None,
    )
    return builder, [builder, *shards]
