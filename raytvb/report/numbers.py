"""Computes the figures that the text, the plots and the page share, from a summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raytvb.maths.counts import mean
from raytvb.report.summary_contracts import AdditionEntry, Negation, Summary


@dataclass(frozen=True)
class Headline:
    """The first figures of the report: mean accuracies, 0 to 1."""

    zero_shot: float
    fine_tuned: float
    full: float
    """All tasks are added, from the full vectors."""
    full_subsets: float
    """Mean over all numbers of tasks added, from the full vectors."""
    chosen: float | None
    """Like `full`, from the chosen basis; None if there is none."""
    chosen_subsets: float | None


@dataclass(frozen=True)
class NegationFigures:
    """Negation of all tasks, from one kind of vectors."""

    targets: int
    lowered: int
    """Targets whose accuracy fell."""
    before: float
    """Mean accuracy of the targets."""
    after: float
    control_kept: float
    """Least share of its validation accuracy that the control kept in any negation."""


def overall(entry: AdditionEntry) -> float:
    """Mean over the numbers of tasks added, each with the same weight."""
    return mean(list(entry.subsets.values()))


def headline(summary: Summary) -> Headline:
    """The first figures of the report."""
    full = summary.addition["full"]
    chosen = None if summary.chosen.name is None else summary.addition[summary.chosen.name]
    return Headline(
        zero_shot=mean(list(summary.zero_shot.values())),
        fine_tuned=mean(list(summary.fine_tuned.values())),
        full=full.mean,
        full_subsets=overall(full),
        chosen=None if chosen is None else chosen.mean,
        chosen_subsets=None if chosen is None else overall(chosen),
    )


def all_tasks(summary: Summary) -> int:
    """Number of tasks of the experiment, with those that the results were built without."""
    tasks = summary.provenance.experiment.get("tasks")
    return len(tasks) if isinstance(tasks, list) else len(summary.tasks)


def chosen_names(summary: Summary) -> list[str]:
    """The chosen basis; empty if there is none."""
    return [] if summary.chosen.name is None else [summary.chosen.name]


def subjects(summary: Summary) -> list[str]:
    """The names that operations are measured on: `full`, and the chosen basis if there is one."""
    return ["full", *chosen_names(summary)]


def subset_sizes(summary: Summary) -> list[int]:
    """Numbers of tasks added, in rising order. The last one is all tasks."""
    return sorted(summary.addition["full"].subsets)


def decoded_bases(summary: Summary) -> dict[str, list[AdditionEntry]]:
    """The bases whose tasks are decoded and added, by method, in rising order of M.

    The online bases of a method are a separate group, `<method> online`.
    """
    groups = {}
    for label, names in decoded_names(summary).items():
        groups[label] = [summary.addition[name] for name in names]
    return groups


def decoded_names(summary: Summary) -> dict[str, list[str]]:
    """The names of `decoded_bases`."""
    groups: dict[str, list[str]] = {}
    for name, entry in summary.addition.items():
        if name != "full" and entry.merge == "decoded":
            label = f"{entry.method} online" if entry.online else entry.method
            groups.setdefault(label, []).append(name)
    for group in groups.values():
        group.sort(key=lambda name: summary.addition[name].size)
    return groups


def negations(summary: Summary) -> dict[str, dict[str, Negation]]:
    """Negations by task, for each of the `subjects` that has some."""
    groups = {}
    if summary.negation:
        groups["full"] = summary.negation
    for name in chosen_names(summary):
        if summary.negation_basis:
            groups[name] = summary.negation_basis
    return groups


def negation_figures(negations: Mapping[str, Negation]) -> NegationFigures:
    """The figures of negations by task."""
    entries = list(negations.values())
    return NegationFigures(
        targets=len(entries),
        lowered=sum(entry.after < entry.before for entry in entries),
        before=mean([entry.before for entry in entries]),
        after=mean([entry.after for entry in entries]),
        control_kept=min(map(_control_kept, entries)),
    )


def _control_kept(entry: Negation) -> float:
    """Share of its validation accuracy that the control kept; 1 if that accuracy was 0."""
    if not entry.control_validation_before:
        return 1.0
    return entry.control_validation_after / entry.control_validation_before


def objective_on_test(summary: Summary, entry: AdditionEntry) -> float:
    """The objective of the search, on the test split instead of validation images."""
    match summary.search.objective_of:
        case "all":
            return entry.mean
        case "single":
            return entry.subsets.get(1, entry.mean)
        case _:
            return overall(entry)
