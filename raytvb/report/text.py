"""The results in lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from raytvb.maths.counts import mean
from raytvb.report.formatting import format_bytes, percent

Summary = Mapping[str, Any]


def decoded_bases(summary: Summary) -> dict[str, dict[int, tuple[str, Mapping[str, Any]]]]:
    """Decoded bases as method -> size -> (name, entry)."""
    found: dict[str, dict[int, tuple[str, Mapping[str, Any]]]] = {}
    for name, entry in summary["addition"].items():
        if name != "full" and entry["merge"] == "decoded":
            label = f"{entry['method']} online" if entry["online"] else entry["method"]
            found.setdefault(label, {})[entry["size"]] = (name, entry)
    return {m: dict(sorted(sizes.items())) for m, sizes in found.items()}


def chosen_names(summary: Summary) -> list[str]:
    """Name of the chosen basis, where there is one."""
    name = summary["chosen"]["name"]
    return [] if name is None else [name]


def subset_sizes(summary: Summary) -> list[str]:
    """Numbers of tasks added, as keys of `subsets`, rising; the last is that of all tasks."""
    return sorted(summary["addition"]["full"]["subsets"], key=int)


def headline(summary: Summary) -> dict[str, float]:
    """The figures at the top, as shares; those of the chosen basis where there is one."""
    found = {
        "zero_shot": mean(list(summary["zero_shot"].values())),
        "fine_tuned": mean(list(summary["fine_tuned"].values())),
    }
    for label, name in (("full", "full"), *(("chosen", n) for n in chosen_names(summary))):
        entry = summary["addition"][name]
        found |= {label: entry["mean"], f"{label}_subsets": mean(list(entry["subsets"].values()))}
    return found


def negations(summary: Summary) -> dict[str, Mapping[str, Mapping[str, Any]]]:
    """Negation by what was subtracted: the full vectors, and the chosen basis."""
    found = {n: summary.get("negation_basis", {}) for n in chosen_names(summary)} | {
        "full": summary["negation"]
    }
    return {name: found[name] for name in reversed(found) if found[name]}


def negated(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How many targets fell, their mean accuracy before and after, the least that the control kept
    on validation.
    """
    found = list(entries.values())
    return {
        "lowered": float(sum(n["after"] < n["before"] for n in found)),
        "before": mean([n["before"] for n in found]),
        "after": mean([n["after"] for n in found]),
        "control_kept": min(
            n["control_validation_after"] / n["control_validation_before"]
            if n["control_validation_before"]
            else 1.0
            for n in found
        ),
    }


def objective_on_test(summary: Summary, entry: Mapping[str, Any]) -> float:
    """What the search maximises, on the test split."""
    found = {"all": entry["mean"], "single": entry["subsets"].get("1", entry["mean"])}
    return found.get(summary["search"]["objective_of"], mean(list(entry["subsets"].values())))


def summary_lines(summary: Summary) -> Iterator[str]:
    """What is printed below the table of additions."""
    figures, chosen, rows = headline(summary), chosen_names(summary), summary["addition"]
    subjects = list(dict.fromkeys(["full", *chosen]))
    why = (
        "* chosen on validation data"
        if chosen
        else f"no basis is chosen: {summary['chosen']['reason']}"
    )
    yield (
        f"{why}. zero-shot {percent(figures['zero_shot'])}, fine-tuned {percent(figures['fine_tuned'])}, all "
        f"tasks added {percent(figures['full'])} ({100 * (figures['full'] - figures['zero_shot']):+.1f} points to "
        f"zero-shot)"
    )
    if summary.get("search"):
        yield (
            "+ Pareto front of the bases and the full vectors: none of them is as small and more accurate on "
            "validation data, or as accurate and smaller"
        )
    for share in sorted({e["validation_share"] for e in rows.values() if e.get("stopped")}):
        names = sorted(
            n for n, e in rows.items() if e.get("stopped") and e["validation_share"] == share
        )
        yield f"stopped early, coefficients from {100 * share:g} % of the validation images: {', '.join(names)}"
    if weighted := [n for n in subjects if "weighted" in rows[n]]:
        of = "task" if rows["full"]["weighted"]["kind"] == "per-task" else "stored vector"
        yield f"all added with a coefficient for each {of}: " + ", ".join(
            f"{n} {percent(rows[n]['weighted']['mean'])} ({percent(rows[n]['mean'])} with one)"
            for n in weighted
        )
    for group in summary.get("additions", ()):
        tasks = (
            " + ".join(group["tasks"])
            if len(group["tasks"]) < 5
            else f"{len(group['tasks'])} named tasks"
        )
        yield f"{tasks}: " + ", ".join(
            f"{n} {percent(m['mean'])} (normalised {percent(m['normalised_mean'])})"
            for n, m in ((n, group["models"][n]) for n in subjects)
        )
    for name, entries in negations(summary).items():
        found = negated(entries)
        yield (
            f"negation{'' if name == 'full' else f' from {name}'}: {found['lowered']:.0f} of {len(entries)} targets "
            f"lowered, on average from {percent(found['before'])} to {percent(found['after'])}; the control keeps "
            f"at least {percent(found['control_kept'])} % of its accuracy on validation"
        )
    if unseen := list(summary.get("unseen", {}).values()):
        zero_shot, basis, full = (
            percent(mean([u[k]["accuracy"] for u in unseen]))
            for k in ("zero_shot", "basis", "full")
        )
        yield (
            f"unseen tasks ({len(unseen)}): zero-shot {zero_shot}, {unseen[0]['basis']['coefficients']} "
            f"coefficients of {chosen[0]} {basis}, {unseen[0]['full']['coefficients']} of the vectors {full}"
        )
    if pairs := summary.get("disentanglement", ()):
        yield (
            f"disentanglement error (0 to 2), mean of {len(pairs)} pair{'s' if len(pairs) > 1 else ''}: "
            + ", ".join(
                f"{n} {mean([p['models'][n]['mean'] for p in pairs]):.2f}" for n in subjects
            )
        )
    for name, kinds in summary.get("online", {}).items():
        of = (
            ""
            if len(kinds["tasks"]) == len(summary["tasks"])
            else f" ({len(kinds['tasks'])} looked at)"
        )
        yield (
            f"{name}, tasks arriving in order: single tasks{of} "
            f"{_at_the_end(kinds['online'], ' at the end, forgetting')} (fitted anew: "
            f"{_at_the_end(kinds['offline'])}; vectors themselves: {_at_the_end(kinds['full'])})"
        )
    if overlap := summary.get("mask_overlap"):
        yield (
            f"overlap of the masks of two tasks (Jaccard index): {overlap['mean']:.2f} on average, "
            f"{overlap['min']:.2f} to {overlap['max']:.2f}"
        )
    stored = summary["stored_bytes"]
    yield (
        f"stored: vectors {format_bytes(stored['vectors'])} and masks {format_bytes(stored['masks'])}, "
        f"{percent((stored['vectors'] + stored['masks']) / stored['dense_fp32'])} % of dense fp32 vectors"
    )


def _at_the_end(found: Mapping[str, Any], between: str = ",") -> str:
    """Mean accuracy after the last arrival and mean forgetting."""
    return (
        f"{percent(found['mean'][-1])}{between} {percent(mean(list(found['forgetting'].values())))}"
    )
