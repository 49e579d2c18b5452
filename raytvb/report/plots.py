"""The plots of the report, as SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from raytvb.report.text import Summary, chosen_names, decoded_bases, negations, subset_sizes


def _svg(
    draw: Callable[[Any], None], width: float = 6.0, height: float = 3.4, columns: int = 1
) -> str:
    """What `draw` makes of the axes, or of a list of them where there are several columns."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    draw(axes[0] if columns == 1 else list(axes))
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _legend(axes: Axes) -> None:
    """Beside the plot where it would cover it."""
    many = len(axes.get_legend_handles_labels()[0]) > 6
    axes.legend(
        fontsize="small", **({"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if many else {})
    )


def plot_error(summary: Summary) -> str:
    """Relative reconstruction error over M, one line a method."""

    def draw(axes: Axes) -> None:
        for method, sizes in decoded_bases(summary).items():
            axes.plot(
                list(sizes), [e["relative_error"] for _, e in sizes.values()], "o-", label=method
            )
        axes.set(xlabel="basis size M", ylabel="relative squared error", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _legend(axes)

    return _svg(draw)


def plot_subsets(summary: Summary) -> str:
    """Accuracy of additions by the number of tasks added."""

    def draw(axes: Axes) -> None:
        sizes, tasks = subset_sizes(summary), len(summary["tasks"])
        # Of each method the largest that compresses, and the chosen one.
        largest = [
            found[max((s for s in found if s < tasks), default=max(found))][0]
            for found in decoded_bases(summary).values()
        ]
        shown = list(dict.fromkeys(["full", *chosen_names(summary), *largest]))
        lines = {n: summary["addition"][n] for n in shown} | dict(summary["random_subset"])
        for name, entry in lines.items():
            style = "k-" if name == "full" else (":" if name in summary["random_subset"] else "o-")
            there = [s for s in sizes if s in entry["subsets"]]
            axes.plot(
                [int(s) for s in there],
                [100 * entry["subsets"][s] for s in there],
                style,
                label=name,
            )
        axes.set(xlabel="tasks added", ylabel="mean test accuracy, %", xscale="log")
        axes.set_xticks([int(s) for s in sizes], sizes, minor=False)
        axes.minorticks_off()
        _legend(axes)

    return _svg(draw)


def plot_tasks(summary: Summary) -> str:
    """Each task's accuracy: zero-shot, fine-tuned, all tasks added from the full vectors and from
    the chosen basis.
    """

    def draw(axes: Axes) -> None:
        tasks = summary["tasks"]
        series = {
            "zero-shot": summary["zero_shot"],
            "fine-tuned": summary["fine_tuned"],
            "all added, full vectors": summary["addition"]["full"]["per_task"],
        }
        series |= {
            f"all added, {n}": summary["addition"][n]["per_task"] for n in chosen_names(summary)
        }
        for k, (label, values) in enumerate(series.items()):
            places = [i + 0.2 * (k - 1.5) for i in range(len(tasks))]
            axes.bar(places, [100 * values[t] for t in tasks], 0.2, label=label)
        axes.set_xticks(
            range(len(tasks)), [t.split("/")[-1] for t in tasks], rotation=40, ha="right"
        )
        axes.set(ylabel="test accuracy, %", xlim=(-0.6, len(tasks) - 0.4))
        axes.legend(fontsize="small", ncols=2, loc="lower left", bbox_to_anchor=(0.0, 1.0))

    return _svg(draw, width=max(6.0, 0.8 * len(summary["tasks"])), height=4.4)


def plot_negation(summary: Summary) -> str:
    """Each target before it is forgotten, and after, from the full vectors and from the chosen
    basis.
    """

    def draw(axes: Axes) -> None:
        tasks, found = list(summary["negation"]), negations(summary)
        series = {"before": [summary["negation"][t]["before"] for t in tasks]}
        series |= {
            f"after, {n}": [entries[t]["after"] for t in tasks] for n, entries in found.items()
        }
        for k, (label, values) in enumerate(series.items()):
            places = [i + 0.25 * (k - len(found) / 2) for i in range(len(tasks))]
            axes.bar(places, [100 * v for v in values], 0.25, label=label)
        axes.set_xticks(
            range(len(tasks)), [t.split("/")[-1] for t in tasks], rotation=40, ha="right"
        )
        axes.set(ylabel="test accuracy of the target, %", xlim=(-0.6, len(tasks) - 0.4))
        axes.legend(fontsize="small", ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0))

    return _svg(draw, width=max(6.0, 0.8 * len(summary["tasks"])), height=4.0)


def plot_stream(history: list[dict[str, Any]]) -> str:
    """Least relative error of any basis after each vector that arrived."""

    def draw(axes: Axes) -> None:
        sizes = sorted({int(s) for h in history for s in h["floor"]})
        for size in sizes:
            points = [
                (h["vectors"], h["floor"][str(size)]) for h in history if str(size) in h["floor"]
            ]
            axes.plot(*zip(*points, strict=True), "o-", label=f"M = {size}")
        axes.set(xlabel="vectors arrived", ylabel="relative squared error", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if sizes:
            axes.legend()

    return _svg(draw)


def plot_online(summary: Summary) -> str:
    """Mean accuracy of the tasks so far after each arrival, each by itself: online, fitted anew,
    the vectors.
    """

    def draw(axes: Axes) -> None:
        last = {
            found["method"]: name
            for name, found in summary["online"].items()
            if found["size"] < len(summary["tasks"])
        } or {"": next(iter(summary["online"]))}
        for number, name in enumerate(last.values()):
            found = summary["online"][name]
            for kind, style in (("online", "o-"), ("offline", ":")):
                label = name if kind == "online" else f"{name.removesuffix('-online')}, fitted anew"
                axes.plot(
                    found["arrivals"],
                    [100 * a for a in found[kind]["mean"]],
                    style,
                    color=f"C{number}",
                    label=label,
                )
        axes.plot(
            found["arrivals"],
            [100 * a for a in found["full"]["mean"]],
            "k--",
            label="vectors themselves",
        )
        axes.set(xlabel="tasks arrived", ylabel="mean test accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _legend(axes)

    return _svg(draw)


def _searched(summary: Summary) -> dict[str, Mapping[str, Any]]:
    """What the front is of: the decoded bases and the full vectors that have a validation
    objective.
    """
    return {
        n: e
        for n, e in summary["addition"].items()
        if e["merge"] == "decoded" and e["validation_objective"] is not None
    }


def _front_labels(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names up and to the left of points, where a front leaves room: those of one place under each
    other.
    """
    places: dict[tuple[int, float], list[str]] = {}
    for name, (x, y) in points.items():
        places.setdefault((round(50 * math.log10(x)), round(y, 1)), []).append(name)
    figure: Any = axes.get_figure()
    figure.draw_without_rendering()  # only then is it known where a point will be
    free = -math.inf
    for names in sorted(places.values(), key=lambda names: points[names[0]][1]):
        shown = names if len(names) < 5 else [*names[:3], f"and {len(names) - 3} more"]
        at = axes.transData.transform(points[names[0]])[1] * 72 / figure.dpi
        low = max(at + 3, free)
        line = {"arrowstyle": "-", "lw": 0.5} if low > at + 9 else None
        axes.annotate(
            "\n".join(shown),
            points[names[0]],
            (-5, low - at),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize="small",
            arrowprops=line,
            bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.5},
        )
        free = low + 10 * len(shown) + 2


def plot_front(summary: Summary) -> str:
    """Validation objective against stored bytes, with the Pareto front."""
    shown, search = _searched(summary), summary["search"]
    points = {
        n: (max(e["stored_bytes"], 1) / 1e6, 100 * e["validation_objective"])
        for n, e in shown.items()
    }
    front = [n for n in search["front"] if n in points]

    def draw(axes: Axes) -> None:
        stopped = [n for n in points if shown[n]["stopped"]]
        rest = [n for n in points if n not in front and n not in stopped]
        for label, names, style, look in (
            ("other bases", rest, "o", {"color": "0.65"}),
            ("stopped early", stopped, "o", {"color": "0.65", "mfc": "none"}),
            ("Pareto front", front, "o-", {}),
            ("chosen", chosen_names(summary), "*", {"ms": 13}),
        ):
            if names:
                axes.plot(
                    *zip(*(points[n] for n in names), strict=True), style, label=label, **look
                )
        axes.axhline(100 * search["zero_shot"], color="k", ls=":", lw=1, label="pretrained model")
        low, high = min(x for x, _ in points.values()), max(x for x, _ in points.values())
        reach = max(high / low, 1.5)
        axes.set(
            xlabel="stored bytes, MB",
            ylabel="validation objective, %",
            xscale="log",
            xlim=(low / reach**0.6, high * reach**0.08),
        )
        axes.margins(y=0.15)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.minorticks_off()
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
        _front_labels(
            axes, {n: points[n] for n in dict.fromkeys([*front, *chosen_names(summary), "full"])}
        )

    return _svg(draw, width=7.5, height=3.6 + 0.08 * len(front))


def plot_disentanglement(pair: Mapping[str, Any], highest: float) -> str:
    """Heat maps of one pair's error, on the colour scale 0 to `highest`."""

    def draw(axes: Any) -> None:
        axes = axes if isinstance(axes, list) else [axes]
        for each, (name, found) in zip(axes, pair["models"].items(), strict=True):
            columns = list(zip(*found["error"], strict=True))  # the first coefficient to the right
            mesh = each.pcolormesh(
                pair["coefficients"],
                pair["coefficients"],
                columns,
                shading="nearest",
                vmin=0.0,
                vmax=highest,
                edgecolors="face",
            )
            each.set_title(f"{name}: mean {found['mean']:.2f}", fontsize="medium")
            each.set(aspect="equal", xlabel=f"coefficient of {pair['tasks'][0].split('/')[-1]}")
            if len(pair["coefficients"]) < 8:
                each.set_xticks(pair["coefficients"])
                each.set_yticks(pair["coefficients"])
        axes[0].set_ylabel(f"coefficient of {pair['tasks'][1].split('/')[-1]}")
        axes[0].get_figure().colorbar(mesh, ax=axes, label="error")

    return _svg(
        draw, width=3.4 * len(pair["models"]) + 1.0, height=3.4, columns=len(pair["models"])
    )


def plot_storage(summary: Summary) -> str:
    """Megabytes: dense float32 vectors, the stored vectors, the masks, and the chosen basis."""

    def draw(axes: Axes) -> None:
        stored = summary["stored_bytes"]
        bars = {
            "dense fp32 vectors": stored["dense_fp32"],
            "stored vectors": stored["vectors"],
            "masks": stored["masks"],
        }
        bars |= {
            f"basis {n}": summary["addition"][n]["stored_bytes"] for n in chosen_names(summary)
        }
        axes.barh(list(bars)[::-1], [v / 1e6 for v in bars.values()][::-1])
        axes.set(xlabel="MB")

    return _svg(draw, height=2.2)
