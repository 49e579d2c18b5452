"""Draws all plots of a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytvb.report.accuracy_plots import plot_negation, plot_online, plot_subsets, plot_tasks
from raytvb.report.basis_plots import (
    plot_disentanglement,
    plot_error,
    plot_storage,
    plot_stream,
)
from raytvb.report.front_plot import plot_front
from raytvb.report.numbers import decoded_bases
from raytvb.report.summary_contracts import Disentanglement, Summary
from raytvb.storage.gram_rows import Arrival


@dataclass(frozen=True)
class Plots:
    """The plots as SVG elements. A plot with nothing to show is an empty string."""

    error: str
    subsets: str
    tasks: str
    front: str
    storage: str
    negation: str
    stream: str
    online: str
    pairs: tuple[str, ...]
    """One plot for each pair of tasks (disentanglement), in the order of the summary."""


def draw_plots(summary: Summary, history: Sequence[Arrival]) -> Plots:
    """Draw the plots of a summary. history: least errors after each vector that arrived."""
    highest = _highest_error(summary.disentanglement)
    return Plots(
        error=plot_error(summary) if decoded_bases(summary) else "",
        subsets=plot_subsets(summary),
        tasks=plot_tasks(summary),
        front=plot_front(summary),
        storage=plot_storage(summary),
        negation=plot_negation(summary) if summary.negation else "",
        stream=plot_stream(history) if history else "",
        online=plot_online(summary) if summary.online else "",
        pairs=tuple(plot_disentanglement(pair, highest) for pair in summary.disentanglement),
    )


def _highest_error(pairs: Sequence[Disentanglement]) -> float:
    """Top of the colour scale that all pairs share: the highest error, or 2 if all are 0."""
    highest = 0.0
    for pair in pairs:
        for errors in pair.models.values():
            highest = max(highest, *map(max, errors.error))
    return min(2.0, highest) or 2.0
