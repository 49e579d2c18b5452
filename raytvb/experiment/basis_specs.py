"""Which bases an experiment has."""

from __future__ import annotations

from dataclasses import dataclass

from raytvb.experiment.config import Experiment, half
from raytvb.maths.online_basis import ONLINE_METHODS


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
    """Basis sizes that are built: those asked for, and T/2, at which every method is reported."""
    return sorted({*experiment.search.sizes, half(len(experiment.tasks))})


def basis_specs(experiment: Experiment) -> list[BasisSpec]:
    """Every method at every size; then, where asked for, the online bases of the methods that have
    an online form.
    """
    offline = [
        BasisSpec(method, size)
        for method in experiment.basis.method
        for size in sizes_of(experiment)
    ]
    if not experiment.basis.online:
        return offline
    online = [
        BasisSpec(spec.method, spec.size, online=True)
        for spec in offline
        if spec.method in ONLINE_METHODS
    ]
    return offline + online
