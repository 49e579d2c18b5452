"""Tries and compares settings for additions of one number of tasks (a size class), on shares of the
validation images.

`first_round` chooses the settings to try, `SizeClass` measures them, and `promising` and
`most_accurate` compare the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from raytvb.experiment.config import Experiment
from raytvb.experiment.sections.search import CoefficientConfig
from raytvb.maths.counts import Count, even_grid, mean
from raytvb.maths.line_search import best_coefficient, climb, ladder, nearest
from raytvb.search.additions import Additions, Counts
from raytvb.search.candidates import Candidate
from raytvb.search.results import Setting, Tried

NOTHING_ADDED = Setting(0.0)


class SizeClass:
    """The accuracy of additions of one number of tasks, by setting and share.

    Shares rise. The images between one share and the next are measured once for each setting, so a
    value does not depend on the order in which settings and shares are measured.
    """

    def __init__(
        self, additions: Additions, subsets: Sequence[Sequence[int]], shares: Sequence[float]
    ) -> None:
        """subsets: all have the same size. shares: rising shares of the images, above 0."""
        self.size = len(subsets[0])
        self._additions = additions
        self._subsets = subsets
        self._edges = (0.0, *shares)
        self._parts: dict[Setting, list[Counts]] = {}
        """Counts on the images between one share and the next, for the shares measured so far."""

    def value(self, setting: Setting, number: int) -> float:
        """Mean accuracy over all tasks of all subsets, on the first `number` shares."""
        return mean([count.accuracy for count in self._totals(setting, number)])

    def expected(self, setting: Setting, number: int) -> float:
        """Like `value`, but the mean of the expected shares of correct answers (see `Count`)."""
        return mean([count.expected / count.total for count in self._totals(setting, number)])

    def row(self, setting: Setting, number: int) -> Tried:
        """The measurement of a setting on the first `number` shares."""
        total = sum(self._totals(setting, number), Count(0, 0))
        return Tried(
            size=self.size,
            coefficient=setting.coefficient,
            own_lengths=setting.own_lengths,
            accuracy=self.value(setting, number),
            expected=self.expected(setting, number),
            correct=total.correct,
            total=total.total,
        )

    def new_images(self, setting: Setting, number: int) -> dict[str, int]:
        """How many images of each task are in share `number` and not in the shares before it."""
        images: dict[str, int] = {}
        for counts in self._measured(setting, number)[number - 1]:
            for task, count in counts.items():
                images[task] = count.total
        return images

    def _measured(self, setting: Setting, number: int) -> list[Counts]:
        """Counts on the first `number` parts of the images. Measures the parts that are missing."""
        parts = self._parts.setdefault(setting, [])
        while len(parts) < number:
            start, stop = self._edges[len(parts)], self._edges[len(parts) + 1]
            counts = self._additions.counts(
                self._subsets, setting.coefficient, setting.own_lengths, start, stop
            )
            parts.append(list(counts))
        return parts[:number]

    def _totals(self, setting: Setting, number: int) -> list[Count]:
        """Counts on the first `number` shares: one for each task of each subset."""
        parts = self._measured(setting, number)
        totals: list[Count] = []
        for subset, counts in enumerate(parts[0]):
            for task in counts:
                totals.append(sum((part[subset][task] for part in parts), Count(0, 0)))
        return totals


def lengths_to_try(experiment: Experiment, candidate: Candidate, size: int) -> tuple[bool, ...]:
    """Values of `Setting.own_lengths` to try for additions of `size` tasks.

    `auto` tries both values. It tries only projected lengths for the addition of all tasks, because
    the projection keeps that sum.
    """
    if not candidate.has_lengths:
        return (False,)
    match experiment.search.lengths:
        case "projected":
            return (False,)
        case "own":
            return (True,)
        case "auto":
            return (False, True) if size < len(experiment.tasks) else (False,)


def first_round(
    experiment: Experiment, size_class: SizeClass, addends: int, lengths: Sequence[bool] = (False,)
) -> list[Setting]:
    """The settings to measure on the first share: those that a line search visits, or a whole grid.

    addends: number of vectors that are summed; the best coefficient is near one over it.
    """
    limits = experiment.search.coefficients
    if limits.strategy == "line":
        return _line_search(limits, size_class, addends, lengths)
    settings: list[Setting] = []
    for own in lengths:
        for coefficient in even_grid(limits.low, limits.high, limits.points):
            settings.append(Setting(coefficient, own))
    return settings


def _line_search(
    limits: CoefficientConfig, size_class: SizeClass, addends: int, lengths: Sequence[bool]
) -> list[Setting]:
    """The settings that line searches visit. There is one line search for each kind of lengths.

    A search climbs by the expected share of correct answers (see `Count`), which is less noisy than
    accuracy on a part of the images. The second search starts at the best coefficient of the first.
    """
    rungs = ladder(addends, limits.low, limits.high)
    start = (1.0 if addends == 1 else 2.0) / addends
    settings: list[Setting] = []
    for own in lengths:
        expected = partial(_expected_on_first_share, size_class, own)
        tried = climb(rungs, nearest(rungs, start), expected)
        settings += [Setting(coefficient, own) for coefficient in tried]
        start = best_coefficient(tried)
    return settings


def _expected_on_first_share(size_class: SizeClass, own: bool, coefficient: float) -> float:
    return size_class.expected(Setting(coefficient, own), 1)


def promising(tried: Sequence[Tried], strategy: str) -> list[Setting]:
    """The settings of a size class that are worth more images, in rising order.

    For a grid, these are all settings. For a line search, it is the setting with the highest
    expected share of correct answers. The most accurate setting is added if its accuracy is higher
    by more than one standard error.
    """
    if strategy == "grid":
        return [row.setting for row in tried]
    likely = min(tried, key=lambda row: (-row.expected, row.setting))
    accurate = most_accurate(tried)
    error = math.sqrt(likely.accuracy * (1 - likely.accuracy) / likely.total)
    settings = {likely.setting}
    if accurate.accuracy > likely.accuracy + error:
        settings.add(accurate.setting)
    return sorted(settings)


def most_accurate(tried: Sequence[Tried]) -> Tried:
    """The row with the highest accuracy.

    Among equally accurate rows, the one with the smallest coefficient, then the one with projected
    lengths.
    """
    return min(tried, key=lambda row: (-row.accuracy, row.setting))
