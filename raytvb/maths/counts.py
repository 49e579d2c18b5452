"""Counts of correct answers, their intervals, and means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Count:
    """Correct answers out of a number of images."""

    correct: int
    total: int
    expected: float = field(default=0.0, compare=False)
    """Sum of the probabilities that the model gives to the right classes. This is the expected
    number of right answers if answers were drawn from the model's probabilities. It changes in
    smaller steps than `correct`, so coefficients can be compared on fewer images."""

    @property
    def accuracy(self) -> float:
        """Share of correct answers, 0 to 1."""
        return self.correct / self.total

    def __add__(self, other: Count) -> Count:
        return Count(
            self.correct + other.correct, self.total + other.total, self.expected + other.expected
        )


def wilson(count: Count, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval (low, high) of an accuracy; z = 1.96 is for 95 %."""
    p, n = count.accuracy, count.total
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At p = 0 and p = 1 rounding could put p outside its own interval.
    low, high = min(p, centre - reach), max(p, centre + reach)
    return max(0.0, low), min(1.0, high)


def even_grid(low: float, high: float, points: int) -> list[float]:
    """`points` numbers, at least 2, in even steps from low to high, both included."""
    return [low + (high - low) * k / (points - 1) for k in range(points)]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, summed exactly, so that it does not depend on the order."""
    return math.fsum(values) / len(values)
