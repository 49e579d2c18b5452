"""Turns the rows of evaluations into accuracies and into the parts of a candidate's entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raytvb.evaluation.rows import Row
from raytvb.maths.counts import mean, wilson
from raytvb.report.summary_contracts import Accuracies, Spread, WeightedAccuracies
from raytvb.search.results import TunedWeights


def accuracies_of(rows: Sequence[Row], model: str) -> dict[str, float]:
    """Accuracy of one model, by task."""
    return {row.task: row.accuracy for row in rows if row.model == model}


def measured(rows: Sequence[Row], fine_tuned: Mapping[str, float]) -> Accuracies:
    """Accuracies of one model, with a row for each task.

    fine_tuned: accuracy of each task's own model, by which the accuracies are normalised.
    """
    per_task, counts, interval = {}, {}, {}
    normalised: dict[str, float | None] = {}
    shares = []
    for row in rows:
        per_task[row.task] = row.accuracy
        counts[row.task] = row.correct, row.total
        interval[row.task] = wilson(row.count)
        normalised[row.task] = None
        if fine_tuned[row.task] > 0:
            normalised[row.task] = row.accuracy / fine_tuned[row.task]
            shares.append(row.accuracy / fine_tuned[row.task])
    return Accuracies(
        mean=mean(list(per_task.values())),
        per_task=per_task,
        normalised=normalised,
        normalised_mean=mean(shares) if shares else None,
        counts=counts,
        interval=interval,
    )


def by_subset_size(rows: Sequence[Row]) -> dict[int, float]:
    """Mean accuracy of the rows of each number of tasks added, in rising order of that number."""
    accuracies: dict[int, list[float]] = {}
    for row in rows:
        accuracies.setdefault(row.size, []).append(row.accuracy)
    return {size: mean(accuracies[size]) for size in sorted(accuracies)}


def weighted(
    rows: Sequence[Row], tuned: TunedWeights, fine_tuned: Mapping[str, float]
) -> WeightedAccuracies:
    """Accuracies of the addition of all tasks with several coefficients.

    rows: all rows of a candidate.
    """
    own_rows = [row for row in rows if row.model == tuned.kind]
    accuracies = measured(own_rows, fine_tuned)
    return WeightedAccuracies(
        **dict(accuracies),
        kind=tuned.kind,
        weights=tuned.weights,
        validation_accuracy=tuned.accuracy,
    )


def spread(accuracies: Accuracies, full: Accuracies) -> Spread:
    """How far the accuracies of single tasks are from those with the full vectors added."""
    gaps = {}
    for task, accuracy in accuracies.per_task.items():
        gaps[task] = accuracy - full.per_task[task]
    worst = min(gaps, key=lambda task: (gaps[task], task))
    return Spread(
        mean_absolute_difference=mean(list(map(abs, gaps.values()))),
        worst_task=worst,
        worst_difference=gaps[worst],
    )
