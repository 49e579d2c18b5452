"""The lines of results that a command prints below the table of additions."""

from __future__ import annotations

from collections.abc import Iterator

from raytvb.errors import FailedPart
from raytvb.maths.counts import mean
from raytvb.report.formatting import format_bytes, percent
from raytvb.report.numbers import all_tasks, headline, negation_figures, negations, subjects
from raytvb.report.summary_contracts import (
    ArrivalAccuracies,
    NamedAddition,
    NothingChosen,
    Online,
    Summary,
)


def summary_lines(summary: Summary) -> Iterator[str]:
    """The lines below the table of additions. Parts that were not measured have no line."""
    yield from missing_lines(summary)
    yield from _additions(summary)
    yield from _stopped(summary)
    yield from _weighted(summary)
    for group in summary.additions:
        yield _named_addition(summary, group)
    yield from _negations(summary)
    yield from _unseen(summary)
    yield from _disentanglement(summary)
    for name, online in summary.online.items():
        yield _online(summary, name, online)
    yield from _storage(summary)


def missing_lines(summary: Summary) -> Iterator[str]:
    """What the results were built without, if tasks are missing."""
    if summary.missing:
        count = f"{len(summary.tasks)} of {all_tasks(summary)} tasks"
        yield f"built from {count}; missing:"
    for task in summary.missing:
        yield f"  {FailedPart(task.name, task.stage, task.reason, task.attempts)}"


def _additions(summary: Summary) -> Iterator[str]:
    """The first figures, and what the marks * and + in the table mean."""
    figures = headline(summary)
    if isinstance(summary.chosen, NothingChosen):
        choice = f"no basis is chosen: {summary.chosen.reason}"
    else:
        choice = "* chosen on validation data"
    gain = 100 * (figures.full - figures.zero_shot)
    yield (
        f"{choice}. zero-shot {percent(figures.zero_shot)}, "
        f"fine-tuned {percent(figures.fine_tuned)}, "
        f"all tasks added {percent(figures.full)} ({gain:+.1f} points to zero-shot)"
    )
    yield (
        "+ on the Pareto front of the bases and the full vectors: no other is as small and more "
        "accurate on validation data, or as accurate and smaller"
    )


def _stopped(summary: Summary) -> Iterator[str]:
    """Candidates whose search ended early, by the share of the images that was used."""
    names: dict[float, list[str]] = {}
    for name, entry in summary.addition.items():
        if entry.stopped and entry.validation_share is not None:
            names.setdefault(entry.validation_share, []).append(name)
    for share in sorted(names):
        yield (
            f"stopped early, coefficients from {100 * share:g} % of the validation images: "
            + ", ".join(sorted(names[share]))
        )


def _weighted(summary: Summary) -> Iterator[str]:
    """Additions with a coefficient for each task or stored vector, and those with one for all."""
    parts, unit = [], "task"
    for name in subjects(summary):
        entry = summary.addition[name]
        if entry.weighted is not None:
            unit = "task" if entry.weighted.kind == "per-task" else "stored vector"
            parts.append(f"{name} {percent(entry.weighted.mean)} ({percent(entry.mean)} with one)")
    if parts:
        yield f"all added with a coefficient for each {unit}: " + ", ".join(parts)


def _named_addition(summary: Summary, group: NamedAddition) -> str:
    many = len(group.tasks) > 4
    tasks = f"{len(group.tasks)} named tasks" if many else " + ".join(group.tasks)
    parts = []
    for name in subjects(summary):
        model = group.models[name]
        normalised = percent(model.normalised_mean)
        parts.append(f"{name} {percent(model.mean)} (normalised {normalised})")
    return f"{tasks}: " + ", ".join(parts)


def _negations(summary: Summary) -> Iterator[str]:
    for name, group in negations(summary).items():
        source = "" if name == "full" else f" from {name}"
        figures = negation_figures(group)
        yield (
            f"negation{source}: {figures.lowered} of {figures.targets} targets lowered, "
            f"on average from {percent(figures.before)} to {percent(figures.after)}; "
            f"the control keeps at least {percent(figures.control_kept)} % of its accuracy on "
            f"validation"
        )


def _unseen(summary: Summary) -> Iterator[str]:
    entries = list(summary.unseen.values())
    if not entries:
        return
    zero_shot, basis, full = [], [], []
    for entry in entries:
        zero_shot.append(entry.zero_shot.accuracy)
        basis.append(entry.basis.accuracy)
        full.append(entry.full.accuracy)
    first = entries[0]  # the numbers of coefficients are the same for all
    yield (
        f"unseen tasks ({len(entries)}): zero-shot {percent(mean(zero_shot))}, "
        f"{first.basis.coefficients} coefficients of {summary.chosen.name} {percent(mean(basis))}, "
        f"{first.full.coefficients} coefficients of the task vectors {percent(mean(full))}"
    )


def _disentanglement(summary: Summary) -> Iterator[str]:
    pairs = summary.disentanglement
    if not pairs:
        return
    parts = []
    for name in subjects(summary):
        error = mean([pair.models[name].mean for pair in pairs])
        parts.append(f"{name} {error:.2f}")
    count = "1 pair" if len(pairs) == 1 else f"{len(pairs)} pairs"
    yield f"disentanglement error (0 to 2), mean of {count}: " + ", ".join(parts)


def _online(summary: Summary, name: str, online: Online) -> str:
    partial = len(online.tasks) < len(summary.tasks)
    tasks = f" (mean of {len(online.tasks)})" if partial else ""
    return (
        f"{name}, tasks arriving in order: single tasks{tasks} {_last_mean(online.online)} "
        f"at the end, forgetting {_forgetting(online.online)} "
        f"(fitted anew: {_last_mean(online.offline)}, {_forgetting(online.offline)}; "
        f"vectors themselves: {_last_mean(online.full)}, {_forgetting(online.full)})"
    )


def _last_mean(accuracies: ArrivalAccuracies) -> str:
    return percent(accuracies.mean[-1])


def _forgetting(accuracies: ArrivalAccuracies) -> str:
    return percent(mean(list(accuracies.forgetting.values())))


def _storage(summary: Summary) -> Iterator[str]:
    if overlap := summary.mask_overlap:
        yield (
            f"overlap of the masks of two tasks (Jaccard index): {overlap.mean:.2f} on average, "
            f"{overlap.min:.2f} to {overlap.max:.2f}"
        )
    stored = summary.stored_bytes
    share = (stored.vectors + stored.masks) / stored.dense_fp32
    yield (
        f"stored: vectors {format_bytes(stored.vectors)} and masks {format_bytes(stored.masks)}, "
        f"{percent(share)} % of dense fp32 vectors"
    )
