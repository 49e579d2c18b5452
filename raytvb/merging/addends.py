"""What a merge can add to the pretrained weights, as the caller describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from raytvb.search.candidates import ADDITION

Lengths = Literal["projected", "own"]
"""Lengths of vectors that are decoded from a basis: `projected`, as they are decoded, or `own`,
stretched to the lengths of the task vectors."""


@dataclass(frozen=True)
class Tasks:
    """Task vectors, stored or decoded from a basis, which a merge method makes into one vector."""

    weights: Mapping[str, float]
    """Weight of each task: 1 adds it, -1 negates it."""
    merge_method: str = ADDITION
    lengths: Lengths | None = None
    """None means what validation chose together with the coefficient. If the caller gives the
    coefficient, or a merge method other than addition, None means `projected`."""

    @property
    def added(self) -> int:
        """Number of tasks with a positive weight, at least 1.

        The search chose a coefficient for each number of tasks added.
        """
        return max(1, sum(weight > 0 for weight in self.weights.values()))


@dataclass(frozen=True)
class BasisSum:
    """The plain sum of the vectors of a convex basis, which adds all tasks."""


@dataclass(frozen=True)
class BasisVectors:
    """Single vectors of a basis."""

    weights: Mapping[int, float]
    """Weight of each vector, by its number in the basis, from 1."""


Addends: TypeAlias = Tasks | BasisSum | BasisVectors
