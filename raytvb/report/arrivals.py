"""Builds the results of online bases after each arrival of a task."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from raytvb.evaluation.rows import Row, read_rows
from raytvb.evaluation.store_names import online_name
from raytvb.maths.counts import mean
from raytvb.maths.online_basis import forgetting
from raytvb.report.summary_contracts import ArrivalAccuracies, Online
from raytvb.storage.store import Store


def online_entry(store: Store, name: str, method: str, size: int) -> Online:
    """The accuracies of the online basis `name` after each arrival.

    Has two references: a basis that was fitted to all vectors so far, and these vectors themselves.
    """
    rows = read_rows(store, online_name(name))
    arrivals = sorted({row.subset for row in rows})
    tasks = list(dict.fromkeys(row.task for row in rows))
    return Online(
        method=method,
        size=size,
        arrivals=tuple(arrivals),
        tasks=tuple(tasks),
        online=_accuracies(rows, "online", arrivals, tasks),
        offline=_accuracies(rows, "offline", arrivals, tasks),
        full=_accuracies(rows, "full", arrivals, tasks),
    )


def _accuracies(
    rows: Sequence[Row], model: str, arrivals: Sequence[int], tasks: Sequence[str]
) -> ArrivalAccuracies:
    """The accuracies in the rows of one model.

    A row has size 1 if its task was decoded by itself, and 0 if all tasks so far were added.
    """
    single: dict[tuple[int, str], float] = {}
    added: dict[int, list[float]] = {}
    for row in rows:
        if row.model == model and row.size == 1:
            single[row.subset, row.task] = row.accuracy
        elif row.model == model:
            added.setdefault(row.subset, []).append(row.accuracy)
    matrix, means, means_added = [], [], []
    for arrived in arrivals:
        accuracies = tuple(single.get((arrived, task)) for task in tasks)
        matrix.append(accuracies)
        means.append(mean([a for a in accuracies if a is not None]))
        means_added.append(mean(added[arrived]))
    return ArrivalAccuracies(
        accuracy=tuple(matrix),
        mean=tuple(means),
        added=tuple(means_added),
        forgetting=dict(zip(tasks, _forgetting(matrix), strict=True)),
    )


def _forgetting(matrix: Sequence[Sequence[float | None]]) -> list[float]:
    """`online_basis.forgetting` of a table of arrivals by tasks, in the order of the tasks."""
    table = torch.full((len(matrix), len(matrix[0])), math.nan)
    for row, accuracies in zip(table, matrix, strict=True):
        for column, accuracy in enumerate(accuracies):
            if accuracy is not None:
                row[column] = accuracy
    lost: list[float] = forgetting(table.double()).tolist()
    return lost
