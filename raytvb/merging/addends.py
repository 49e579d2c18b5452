"""What a merge adds to the pretrained weights, as its caller asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from raytvb.search.candidates import ADDITION

Lengths = Literal["projected", "own"]
"""Of vectors that are decoded from a basis: as they are decoded, or stretched to the lengths of the
task vectors."""


@dataclass(frozen=True)
class Tasks:
    """Task vectors, stored or decoded from a basis, made into one by a merge method."""

    weights: Mapping[str, float]
    """By task: 1 adds it, -1 negates it."""
    merge_method: str = ADDITION
    lengths: Lengths | None = None
    """None: what validation chose along with the coefficient. If the caller gives the coefficient
    or another merge method than addition, None is `projected`."""

    @property
    def added(self) -> int:
        """Number of tasks with a positive weight, at least 1: the search chose a coefficient for
        each such number.
        """
        return max(1, sum(weight > 0 for weight in self.weights.values()))


@dataclass(frozen=True)
class BasisSum:
    """The plain sum of the vectors of a convex basis, which adds all tasks."""


@dataclass(frozen=True)
class BasisVectors:
    """Single vectors of a basis."""

    weights: Mapping[int, float]
    """By the vector's number in the basis, from 1."""


Addends: TypeAlias = Tasks | BasisSum | BasisVectors
