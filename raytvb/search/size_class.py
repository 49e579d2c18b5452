"""Settings of additions of one number of tasks: tried, compared, measured on shares of the
images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from raytvb.experiment.config import Experiment
from raytvb.maths.counts import Count, even_grid, mean
from raytvb.maths.line_search import best_coefficient, climb, ladder, nearest
from raytvb.search.additions import Additions, Counts
from raytvb.search.candidates import Candidate

Setting = tuple[
    float, bool
]  # a coefficient, and whether decoded vectors have the task vectors' own lengths


class SizeClass:
    """Accuracy of additions of one number of tasks by setting, on shares of the images; nothing is
    measured twice.

    `shares` rise; images are measured between one and the next, so that what has been measured when
    does not matter.
    """

    def __init__(
        self, additions: Additions, subsets: Sequence[Sequence[int]], shares: Sequence[float]
    ) -> None:
        self._additions, self._subsets, self._shares = additions, subsets, shares
        self._counts: dict[Setting, list[Counts]] = {}

    def value(self, setting: Setting, number: int) -> float:
        """Mean accuracy over all tasks of all subsets on the first `number` shares."""
        return mean(
            [c.accuracy for counts in self._totals(setting, number) for c in counts.values()]
        )

    def expected(self, setting: Setting, number: int) -> float:
        """As `value`, of the expected share of correct answers."""
        return mean(
            [
                c.expected / c.total
                for counts in self._totals(setting, number)
                for c in counts.values()
            ]
        )

    def _totals(self, setting: Setting, number: int) -> Counts:
        """Counts by subset and task on the first `number` shares."""
        parts, (alpha, own) = self._counts.setdefault(setting, []), setting
        while len(parts) < number:
            start = self._shares[len(parts) - 1] if parts else 0.0
            stop = self._shares[len(parts)]
            parts.append(list(self._additions.counts(self._subsets, alpha, own, start, stop)))
        return [
            {t: sum((p[k][t] for p in parts[:number]), Count(0, 0)) for t in parts[0][k]}
            for k in range(len(self._subsets))
        ]

    def row(self, size: int, setting: Setting, number: int) -> dict[str, Any]:
        """What the first `number` shares say of a setting."""
        total = sum(
            (c for counts in self._totals(setting, number) for c in counts.values()), Count(0, 0)
        )
        return {
            "size": size,
            "coefficient": setting[0],
            "own_lengths": setting[1],
            "accuracy": self.value(setting, number),
            "expected": self.expected(setting, number),
            "correct": total.correct,
            "total": total.total,
        }


def lengths_to_try(experiment: Experiment, candidate: Candidate, size: int) -> tuple[bool, ...]:
    """Whether additions of `size` tasks are tried with projected lengths (False), the task vectors'
    own, or both.
    """
    asked = experiment.search.lengths
    if not candidate.has_lengths or asked == "projected":
        return (False,)
    return (
        (True,) if asked == "own" else (False, True) if size < len(experiment.tasks) else (False,)
    )


def first_round(
    experiment: Experiment, size_class: SizeClass, addends: int, lengths: Sequence[bool] = (False,)
) -> list[Setting]:
    """The settings that are measured on the first share: those of a line search, or all of the
    grid.

    The line search climbs by the expected number of correct answers (see `Count`), which is less
    noisy than accuracy on a part of the images. With the second kind of lengths it starts where it
    ended with the first.
    """
    limits, found = experiment.search.coefficients, list[Setting]()
    if limits.strategy == "grid":
        return [
            (a, own) for own in lengths for a in even_grid(limits.low, limits.high, limits.points)
        ]
    rungs = ladder(addends, limits.low, limits.high)
    likely = (1.0 if addends == 1 else 2.0) / addends
    for own in lengths:
        tried = climb(rungs, nearest(rungs, likely), partial(_expected, size_class, own))
        found += [(a, own) for a in tried]
        likely = best_coefficient(tried)
    return found


def _expected(size_class: SizeClass, own: bool, alpha: float) -> float:
    return size_class.expected((alpha, own), 1)


def promising(tried: Sequence[Mapping[str, Any]], strategy: str) -> list[Setting]:
    """Settings that are worth more images, out of what was tried for a size class: the one with the
    most expected answers, and the most accurate where it is more accurate by over a standard error.
    All of a grid."""
    if strategy == "grid":
        return [(t["coefficient"], t["own_lengths"]) for t in tried]
    likely = min(tried, key=lambda t: (-t["expected"], t["coefficient"], t["own_lengths"]))
    accurate = most_accurate(tried)
    error = math.sqrt(likely["accuracy"] * (1 - likely["accuracy"]) / likely["total"])
    both = [likely, *([accurate] if accurate["accuracy"] > likely["accuracy"] + error else [])]
    return sorted((t["coefficient"], t["own_lengths"]) for t in both)


def most_accurate(tried: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row with the highest accuracy; of equals that of the smallest coefficient, and of
    projected lengths.
    """
    return min(tried, key=lambda t: (-t["accuracy"], t["coefficient"], t["own_lengths"]))
