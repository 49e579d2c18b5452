"""Draws accuracies: of additions, every task, negation, and tasks that arrive over time."""

from __future__ import annotations

from matplotlib.axes import Axes

from raytvb.report.numbers import (
    chosen_names,
    decoded_names,
    negations,
    subjects,
    subset_sizes,
)
from raytvb.report.plot_style import (
    add_legend,
    new_figure,
    percentages,
    svg,
    task_bars,
    whole_numbers,
)
from raytvb.report.summary_contracts import AdditionEntry, Online, Summary


def plot_subsets(summary: Summary) -> str:
    """Accuracy over the number of tasks added, as SVG.

    Shows the full vectors, the chosen basis, one basis of each method, and the random subsets.
    """
    figure = new_figure()
    axes, sizes = figure.subplots(), subset_sizes(summary)
    shown = dict.fromkeys([*subjects(summary), *_largest_bases(summary)])  # each name once
    for name in shown:
        _plot_subsets_of(axes, name, summary.addition[name], "k-" if name == "full" else "o-")
    for name, entry in summary.random_subset.items():
        _plot_subsets_of(axes, name, entry, ":")
    axes.set(xlabel="tasks added", ylabel="mean test accuracy, %", xscale="log")
    axes.set_xticks(sizes, list(map(str, sizes)), minor=False)
    axes.minorticks_off()
    add_legend(axes)
    return svg(figure)


def _largest_bases(summary: Summary) -> list[str]:
    """For each method, its largest basis with fewer vectors than tasks, or else its largest."""
    names = []
    for group in decoded_names(summary).values():
        compressing = [n for n in group if summary.addition[n].size < len(summary.tasks)]
        names.append((compressing or group)[-1])
    return names


def _plot_subsets_of(axes: Axes, name: str, entry: AdditionEntry, style: str) -> None:
    sizes, accuracies = zip(*sorted(entry.subsets.items()), strict=True)
    axes.plot(sizes, percentages(accuracies), style, label=name)


def plot_tasks(summary: Summary) -> str:
    """Bars of each task's accuracy, as SVG.

    Shows zero-shot and fine-tuned accuracy, and that of the model with all tasks added, from the
    full vectors and from the chosen basis.
    """
    figure = new_figure(width=max(6.0, 0.8 * len(summary.tasks)), height=4.4)
    axes = figure.subplots()
    accuracies = {
        "zero-shot": summary.zero_shot,
        "fine-tuned": summary.fine_tuned,
        "all added, full vectors": summary.addition["full"].per_task,
    }
    for name in chosen_names(summary):
        accuracies[f"all added, {name}"] = summary.addition[name].per_task
    series = {}
    for label, per_task in accuracies.items():
        series[label] = [per_task[task] for task in summary.tasks]
    task_bars(axes, summary.tasks, series, width=0.2, columns=2)
    axes.set_ylabel("test accuracy, %")
    return svg(figure)


def plot_negation(summary: Summary) -> str:
    """Bars of each target's accuracy before and after its vector is subtracted, as SVG."""
    figure = new_figure(width=max(6.0, 0.8 * len(summary.tasks)), height=4.0)
    axes, tasks = figure.subplots(), list(summary.negation)
    series = {"before": [summary.negation[task].before for task in tasks]}
    for name, group in negations(summary).items():
        series[f"after, {name}"] = [group[task].after for task in tasks]
    task_bars(axes, tasks, series, width=0.25, columns=3)
    axes.set_ylabel("test accuracy of the target, %")
    return svg(figure)


def plot_online(summary: Summary) -> str:
    """Mean accuracy of the tasks so far, each by itself, after each arrival, as SVG.

    Shows online bases, bases fitted again to all vectors so far, and the vectors themselves.
    """
    figure = new_figure()
    axes, shown = figure.subplots(), _shown_online(summary)
    for number, name in enumerate(shown):
        _plot_online_of(axes, name, summary.online[name], f"C{number}")
    last = summary.online[shown[-1]]  # the vectors are the same whatever the basis
    axes.plot(last.arrivals, percentages(last.full.mean), "k--", label="vectors themselves")
    axes.set(xlabel="tasks arrived", ylabel="mean test accuracy, %")
    whole_numbers(axes)
    add_legend(axes)
    return svg(figure)


def _plot_online_of(axes: Axes, name: str, online: Online, colour: str) -> None:
    offline_name = f"{name.removesuffix('-online')}, fitted anew"
    for label, accuracies, style in (
        (name, online.online, "o-"),
        (offline_name, online.offline, ":"),
    ):
        means = percentages(accuracies.mean)
        axes.plot(online.arrivals, means, style, color=colour, label=label)


def _shown_online(summary: Summary) -> list[str]:
    """For each method, its last online basis with fewer vectors than tasks.

    If no method has one, the first online basis of the summary.
    """
    by_method = {}
    for name, online in summary.online.items():
        if online.size < len(summary.tasks):
            by_method[online.method] = name
    return list(by_method.values()) or [next(iter(summary.online))]
