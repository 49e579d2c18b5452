"""What all plots share: figures, bars, legends, and the SVG that the page contains."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def new_figure(width: float = 6.0, height: float = 3.4) -> Figure:
    """An empty figure; width and height in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure) -> str:
    """The figure as an SVG element, without the XML header and without a date."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def short(task: str) -> str:
    """`glyphs/greek-blur` -> `greek-blur`."""
    return task.split("/")[-1]


def percentages(shares: Iterable[float]) -> list[float]:
    """0.5 -> 50.0."""
    return [100 * share for share in shares]


def whole_numbers(axes: Axes) -> None:
    """Place the ticks of the x axis only at whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def add_legend(axes: Axes) -> None:
    """Add a legend, in the plot or, if it would cover the plot, beside it."""
    if len(axes.get_legend_handles_labels()[0]) > 6:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        axes.legend(fontsize="small")


def task_bars(
    axes: Axes,
    tasks: Sequence[str],
    series: Mapping[str, Sequence[float]],
    width: float,
    columns: int,
) -> None:
    """Draw one group of bars for each task, with one bar for each series, as percentages.

    Args:
        series: accuracies, 0 to 1, in the order of the tasks, by label.
        width: width of a bar; the groups are 1 apart.
        columns: number of columns of the legend, which is above the plot.
    """
    middle = (len(series) - 1) / 2
    for number, (label, accuracies) in enumerate(series.items()):
        places = [place + width * (number - middle) for place in range(len(tasks))]
        axes.bar(places, percentages(accuracies), width, label=label)
    axes.set_xticks(range(len(tasks)), list(map(short, tasks)), rotation=40, ha="right")
    axes.set_xlim(-0.6, len(tasks) - 0.4)
    axes.legend(fontsize="small", ncols=columns, loc="lower left", bbox_to_anchor=(0.0, 1.0))
