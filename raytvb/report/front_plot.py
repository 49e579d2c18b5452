"""Draws accuracy against stored bytes, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from raytvb.report.numbers import chosen_names
from raytvb.report.plot_style import new_figure, svg
from raytvb.report.summary_contracts import Summary

Points = Mapping[str, tuple[float, float]]
"""Megabytes and validation objective in percent, by candidate."""


def plot_front(summary: Summary) -> str:
    """Validation objective against stored bytes, with the Pareto front, as SVG.

    Shows the full vectors and the bases whose tasks are decoded.
    """
    points, chosen = _points(summary), chosen_names(summary)
    stopped, others, front = _marks(summary, points)
    figure = new_figure(width=7.5, height=3.6 + 0.08 * len(front))
    axes = figure.subplots()
    _plot(axes, points, others, "other bases", marker="o", color="0.65")
    _plot(axes, points, stopped, "stopped early", marker="o", color="0.65", mfc="none")
    _plot(axes, points, front, "Pareto front", marker="o", ls="-")
    _plot(axes, points, chosen, "chosen", marker="*", ms=13)
    zero_shot = 100 * summary.search.zero_shot
    axes.axhline(zero_shot, color="k", ls=":", lw=1, label="pretrained model")
    _scale(axes, points)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    labelled = dict.fromkeys([*front, *chosen, "full"])
    _label(figure, axes, {name: points[name] for name in labelled})
    return svg(figure)


def _points(summary: Summary) -> Points:
    """The decoded bases and the full vectors that have a validation objective."""
    points = {}
    for name, entry in summary.addition.items():
        if entry.merge == "decoded" and entry.validation_objective is not None:
            megabytes = max(entry.stored_bytes, 1) / 1e6
            points[name] = (megabytes, 100 * entry.validation_objective)
    return points


def _marks(summary: Summary, points: Points) -> tuple[list[str], list[str], list[str]]:
    """The names of (stopped early, other, Pareto front) points. The first and last may overlap."""
    front = [name for name in summary.search.front if name in points]
    stopped, others = [], []
    for name in points:
        if summary.addition[name].stopped:
            stopped.append(name)
        elif name not in front:
            others.append(name)
    return stopped, others, front


def _plot(axes: Axes, points: Points, names: Iterable[str], label: str, **style: Any) -> None:
    """Draw one mark for each name. A line joins them only if the style has one."""
    places = [points[name] for name in names]
    if places:
        megabytes, objectives = zip(*places, strict=True)
        axes.plot(megabytes, objectives, label=label, **({"ls": ""} | style))


def _scale(axes: Axes, points: Points) -> None:
    """Make the axis of bytes logarithmic, with room for labels to the left of the points."""
    megabytes, _ = zip(*points.values(), strict=True)
    low, high = min(megabytes), max(megabytes)
    reach = max(high / low, 1.5)
    axes.set(xlabel="stored bytes, MB", ylabel="validation objective, %", xscale="log")
    axes.set_xlim(low / reach**0.6, high * reach**0.08)
    axes.margins(y=0.15)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.minorticks_off()


def _label(figure: Figure, axes: Axes, points: Points) -> None:
    """Write names above and to the left of the points, where a front leaves room."""
    figure.draw_without_rendering()  # places of points are known only after this
    free = -math.inf
    for names in _groups(points):
        shown = names if len(names) < 5 else [*names[:3], f"and {len(names) - 3} more"]
        place = points[names[0]]
        height = axes.transData.transform(place)[1] * 72 / figure.dpi  # in typographic points
        bottom = max(height + 3, free)
        arrow = {"arrowstyle": "-", "lw": 0.5} if bottom > height + 9 else None
        axes.annotate(
            "\n".join(shown),
            place,
            (-5, bottom - height),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize="small",
            arrowprops=arrow,
            bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.5},
        )
        free = bottom + 10 * len(shown) + 2


def _groups(points: Points) -> list[list[str]]:
    """Names of points that are drawn on the same spot, the lowest spot first."""
    groups: dict[tuple[int, float], list[str]] = {}
    for name, (megabytes, objective) in points.items():
        spot = round(50 * math.log10(megabytes)), round(objective, 1)
        groups.setdefault(spot, []).append(name)
    return sorted(groups.values(), key=lambda names: points[names[0]][1])
