"""The report: `report/summary.json` for programs and one self-contained HTML page with tables and plots."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import jinja2
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raytvb import artifacts
from raytvb.config import Experiment
from raytvb.evaluate import mean
from raytvb.gram_state import GramState
from raytvb.store import Store
from raytvb.summary import summarise

Summary = Mapping[str, Any]


def write_report(store: Store, experiment: Experiment) -> dict[str, Any]:
    """Write summary and page, the page first; returns the summary. Raises UserError where results are missing."""
    summary = summarise(store, experiment)
    history = GramState.read(store).history
    store.write(artifacts.REPORT, render(summary, experiment.name, history).encode())
    store.write_json(artifacts.SUMMARY, summary)
    return summary


def _svg(draw: Callable[[Axes], None], width: float = 6.0, height: float = 3.4) -> str:
    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure.subplots())
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg"):]


def _legend(axes: Axes) -> None:
    """Beside the plot where it would cover it."""
    many = len(axes.get_legend_handles_labels()[0]) > 6
    axes.legend(fontsize="small", **({"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if many else {}))


def _bases(summary: Summary) -> dict[str, dict[int, tuple[str, Mapping[str, Any]]]]:
    """Decoded bases as method -> size -> (name, entry)."""
    found: dict[str, dict[int, tuple[str, Mapping[str, Any]]]] = {}
    for name, entry in summary["addition"].items():
        if name != "full" and entry["merge"] == "decoded":
            label = f"{entry['method']} online" if entry["online"] else entry["method"]
            found.setdefault(label, {})[entry["size"]] = (name, entry)
    return {m: dict(sorted(sizes.items())) for m, sizes in found.items()}


def subset_sizes(summary: Summary) -> list[str]:
    """Numbers of tasks added, as keys of `subsets`, rising; the last is that of all tasks."""
    return sorted(summary["addition"]["full"]["subsets"], key=int)


def plot_error(summary: Summary) -> str:
    """Relative reconstruction error over M, one line a method."""
    def draw(axes: Axes) -> None:
        for method, sizes in _bases(summary).items():
            axes.plot(list(sizes), [e["relative_error"] for _, e in sizes.values()], "o-", label=method)
        axes.set(xlabel="basis size M", ylabel="relative squared error", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)
    return _svg(draw)


def plot_subsets(summary: Summary) -> str:
    """Accuracy of additions by the number of tasks added."""
    def draw(axes: Axes) -> None:
        sizes, tasks = subset_sizes(summary), len(summary["tasks"])
        # Of each method the largest that compresses, and the chosen one.
        largest = [found[max((s for s in found if s < tasks), default=max(found))][0]
                   for found in _bases(summary).values()]
        shown = list(dict.fromkeys(["full", summary["chosen"]["name"], *largest]))
        lines = {n: summary["addition"][n] for n in shown} | dict(summary["random_subset"])
        for name, entry in lines.items():
            style = "k-" if name == "full" else (":" if name in summary["random_subset"] else "o-")
            there = [s for s in sizes if s in entry["subsets"]]
            axes.plot([int(s) for s in there], [100 * entry["subsets"][s] for s in there], style, label=name)
        axes.set(xlabel="tasks added", ylabel="mean test accuracy, %", xscale="log")
        axes.set_xticks([int(s) for s in sizes], sizes, minor=False)
        axes.minorticks_off()
        _legend(axes)
    return _svg(draw)


def plot_tasks(summary: Summary) -> str:
    """Each task's accuracy: zero-shot, fine-tuned, all tasks added from the full vectors and from the chosen basis."""
    def draw(axes: Axes) -> None:
        tasks = summary["tasks"]
        series = {"zero-shot": summary["zero_shot"], "fine-tuned": summary["fine_tuned"],
                  "all added, full vectors": summary["addition"]["full"]["per_task"],
                  f"all added, {summary['chosen']['name']}": summary["addition"][summary["chosen"]["name"]]["per_task"]}
        for k, (label, values) in enumerate(series.items()):
            places = [i + 0.2 * (k - 1.5) for i in range(len(tasks))]
            axes.bar(places, [100 * values[t] for t in tasks], 0.2, label=label)
        axes.set_xticks(range(len(tasks)), [t.split("/")[-1] for t in tasks], rotation=40, ha="right")
        axes.set(ylabel="test accuracy, %")
        axes.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.22))
    return _svg(draw, width=max(6.0, 0.8 * len(summary["tasks"])), height=4.4)


def plot_negation(summary: Summary) -> str:
    """Target and control, before and after forgetting each task."""
    def draw(axes: Axes) -> None:
        tasks = list(summary["negation"])
        for k, (field, label) in enumerate((("before", "target before"), ("after", "target after"),
                                            ("control_before", "control before"), ("control_after", "control after"))):
            values = [100 * summary["negation"][t][field] for t in tasks]
            axes.bar([i + 0.2 * (k - 1.5) for i in range(len(tasks))], values, 0.2, label=label)
        axes.set_xticks(range(len(tasks)), [t.split("/")[-1] for t in tasks], rotation=40, ha="right")
        axes.set(ylabel="test accuracy, %")
        axes.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.18))
    return _svg(draw, width=max(6.0, 0.8 * len(summary["tasks"])), height=4.0)


def plot_stream(history: list[dict[str, Any]]) -> str:
    """Least relative error of any basis after each vector that arrived."""
    def draw(axes: Axes) -> None:
        sizes = sorted({int(s) for h in history for s in h["floor"]})
        for size in sizes:
            points = [(h["vectors"], h["floor"][str(size)]) for h in history if str(size) in h["floor"]]
            axes.plot(*zip(*points, strict=True), "o-", label=f"M = {size}")
        axes.set(xlabel="vectors arrived", ylabel="relative squared error", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if sizes:
            axes.legend()
    return _svg(draw)


def plot_online(summary: Summary) -> str:
    """Mean accuracy of the tasks so far after each arrival, online and fitted anew, each decoded by itself."""
    def draw(axes: Axes) -> None:
        last = {found["method"]: name for name, found in summary["online"].items()
                if found["size"] < len(summary["tasks"])} or {"": next(iter(summary["online"]))}
        for number, name in enumerate(last.values()):
            found = summary["online"][name]
            for kind, style in (("online", "o-"), ("offline", ":")):
                label = name if kind == "online" else f"{name.removesuffix('-online')}, fitted anew"
                axes.plot(found["arrivals"], [100 * a for a in found[kind]["mean"]], style, color=f"C{number}",
                          label=label)
        axes.set(xlabel="tasks arrived", ylabel="mean test accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)
    return _svg(draw)


def plot_storage(summary: Summary) -> str:
    """Bytes: dense float32 vectors, the stored vectors, the masks, and the chosen basis."""
    def draw(axes: Axes) -> None:
        stored = summary["stored_bytes"]
        chosen = summary["chosen"]["name"]
        bars = {"dense fp32 vectors": stored["dense_fp32"], "stored vectors": stored["vectors"],
                "masks": stored["masks"], f"basis {chosen}": summary["addition"][chosen]["stored_bytes"]}
        axes.barh(list(bars)[::-1], [v / 1e6 for v in bars.values()][::-1])
        axes.set(xlabel="MB")
    return _svg(draw, height=2.2)


def headline(summary: Summary) -> dict[str, float]:
    """The figures at the top, in percent or as shares."""
    negation = list(summary["negation"].values())
    chosen = summary["addition"][summary["chosen"]["name"]]
    found = {"zero_shot": mean(list(summary["zero_shot"].values())),
             "fine_tuned": mean(list(summary["fine_tuned"].values())),
             "full": summary["addition"]["full"]["mean"], "chosen": chosen["mean"],
             "full_subsets": mean(list(summary["addition"]["full"]["subsets"].values())),
             "chosen_subsets": mean(list(chosen["subsets"].values()))}
    if negation:
        found |= {"lowered": float(sum(n["after"] < n["before"] for n in negation)),
                  "target_before": mean([n["before"] for n in negation]),
                  "target_after": mean([n["after"] for n in negation]),
                  "control_kept": min(n["control_validation_after"] / n["control_validation_before"]
                                      if n["control_validation_before"] else 1.0 for n in negation)}
    return found


def render(summary: Summary, name: str, history: list[dict[str, Any]]) -> str:
    """The HTML page; everything inline, nothing fetched."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}"
    environment.filters["bytes"] = format_bytes
    environment.globals["subset_sizes"] = subset_sizes(summary)
    environment.globals["mean"] = lambda values: mean(list(values))
    template = environment.from_string((files("raytvb") / "report.html.j2").read_text(encoding="utf-8"))
    plots = {"error": plot_error(summary), "subsets": plot_subsets(summary), "tasks": plot_tasks(summary),
             "storage": plot_storage(summary), "negation": plot_negation(summary) if summary["negation"] else "",
             "stream": plot_stream(history) if history else "",
             "online": plot_online(summary) if summary["online"] else ""}
    return template.render(name=name, summary=summary, plots=plots, headline=headline(summary),
                           embedded=all(t.startswith("glyphs/") for t in summary["tasks"]))


def format_bytes(size: float) -> str:
    """1234567 -> '1.23 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")
