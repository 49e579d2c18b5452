"""The report: `report/summary.json` for programs and one self-contained HTML page with tables and
plots.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import jinja2

from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import REPORT, SUMMARY
from raytvb.maths.counts import mean
from raytvb.report.formatting import format_bytes, percent
from raytvb.report.plots import (
    plot_disentanglement,
    plot_error,
    plot_front,
    plot_negation,
    plot_online,
    plot_storage,
    plot_stream,
    plot_subsets,
    plot_tasks,
)
from raytvb.report.summary import summarise
from raytvb.report.text import (
    Summary,
    chosen_names,
    decoded_bases,
    headline,
    negated,
    negations,
    objective_on_test,
    subset_sizes,
)
from raytvb.storage.gram_state import GramState
from raytvb.storage.store import Store

OBJECTIVES = {
    "subsets": "the mean accuracy of additions of all sizes, each size weighing the same",
    "all": "the accuracy of the addition of all tasks",
    "single": "the mean accuracy of the tasks one by one",
}


def write_report(store: Store, experiment: Experiment) -> dict[str, Any]:
    """Write summary and page, the page first; returns the summary. Raises UserError where results
    are missing.
    """
    summary = summarise(store, experiment)
    history = GramState.read(store).history
    store.write(REPORT, render(summary, experiment.name, history).encode())
    store.write_json(SUMMARY, summary)
    return summary


def render(summary: Summary, name: str, history: list[dict[str, Any]]) -> str:
    """The HTML page; everything inline, nothing fetched."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "bytes": format_bytes,
        "interval": lambda ends: "–".join(map(percent, ends)),
        "short": lambda task: task.split("/")[-1],
    }
    pairs = summary["disentanglement"]
    plain = {n: e for n, e in summary["addition"].items() if e["merge"] in ("decoded", "sum")}
    highest = max(
        (e for p in pairs for m in p["models"].values() for row in m["error"] for e in row),
        default=0.0,
    )
    environment.globals |= {
        "mean": lambda values: mean(list(values)),
        "subset_sizes": subset_sizes(summary),
        "objectives": OBJECTIVES,
        "objective_on_test": lambda entry: objective_on_test(summary, entry),
        "subjects": ["full", *chosen_names(summary)],
        "negated": {n: negated(entries) for n, entries in negations(summary).items()},
        "plain": plain | summary["random_subset"],
        "merged": {n: e for n, e in summary["addition"].items() if n not in plain},
        "weighted": {n: e for n, e in summary["addition"].items() if "weighted" in e},
    }
    template = environment.from_string(
        (files("raytvb.report") / "page.html.j2").read_text(encoding="utf-8")
    )
    plots = {
        "error": plot_error(summary) if decoded_bases(summary) else "",
        "subsets": plot_subsets(summary),
        "tasks": plot_tasks(summary),
        "front": plot_front(summary),
        "storage": plot_storage(summary),
        "negation": plot_negation(summary) if summary["negation"] else "",
        "stream": plot_stream(history) if history else "",
        "online": plot_online(summary) if summary["online"] else "",
        "pairs": [plot_disentanglement(p, min(2.0, highest) or 2.0) for p in pairs],
    }
    return template.render(
        name=name,
        summary=summary,
        plots=plots,
        headline=headline(summary),
        embedded=all(t.startswith("glyphs/") for t in summary["tasks"]),
    )
