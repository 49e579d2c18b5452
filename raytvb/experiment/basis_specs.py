"""Lists the bases of an experiment."""

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
    """Whether the basis takes in the task vectors one by one, and sees each of them once."""

    @property
    def name(self) -> str:
        """Name of the basis in the store and in every report, such as `ae-m4` or `ae-m4-online`."""
        return f"{self.method}-m{self.size}{'-online' if self.online else ''}"


def sizes_of(experiment: Experiment) -> list[int]:
    """The basis sizes M that are built, in rising order.

    They are the sizes that the search compares, and T/2, at which every method is reported.
    """
    return sorted({*experiment.search.sizes, half(len(experiment.tasks))})


def basis_specs(experiment: Experiment) -> list[BasisSpec]:
    """All bases of the experiment: every method at every size, then the online bases.

    There are online bases only if the experiment asks for them, and only some methods have an
    online form.
    """
    offline: list[BasisSpec] = []
    online: list[BasisSpec] = []
    for method in experiment.basis.method:
        for size in sizes_of(experiment):
            offline.append(BasisSpec(method, size))
            if experiment.basis.online and method in online_methods():
                online.append(BasisSpec(method, size, online=True))
    return offline + online
