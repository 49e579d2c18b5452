"""Which bases an experiment has."""

from __future__ import annotations

from dataclasses import dataclass

from raytvb.experiment.config import Experiment, half
from raytvb.maths.basis_registry import online_methods


@dataclass(frozen=True)
class BasisSpec:
    """One basis of an experiment: how it is fitted, and its number M of vectors."""

    method: str
    size: int
    online: bool = False
    """True if it followed the tasks one by one, each task vector seen once."""

    @property
    def name(self) -> str:
        """Its name in the store and in every report, such as `ae-m4` or `ae-m4-online`."""
        return f"{self.method}-m{self.size}{'-online' if self.online else ''}"


def sizes_of(experiment: Experiment) -> list[int]:
    """Basis sizes M that are built, rising: those that the search compares, and T/2.

    At T/2 every method is reported.
    """
    return sorted({*experiment.search.sizes, half(len(experiment.tasks))})


def basis_specs(experiment: Experiment) -> list[BasisSpec]:
    """Every method at every size; then the online bases, where the experiment wants them.

    Only some methods have an online form.
    """
    offline: list[BasisSpec] = []
    online: list[BasisSpec] = []
    for method in experiment.basis.method:
        for size in sizes_of(experiment):
            offline.append(BasisSpec(method, size))
            if experiment.basis.online and method in online_methods():
                online.append(BasisSpec(method, size, online=True))
    return offline + online
