"""The report of a run: `report/summary.json` for programs, and a page for people.

Read the files of this folder in this order:
    summary_contracts.py  the types of a summary
    summary.py            builds the summary from a finished store; finished_search.py,
                          addition_entries.py, accuracies.py, operation_entries.py and arrivals.py
                          build its parts
    history.py            reads how the store grew
    numbers.py            computes means and counts of a summary, for everything that shows it
    text.py               the lines that a command prints
    plots.py              the plots, as SVG; plot_style.py and the *_plot(s).py draw them
    page.py               the page, from the template page.html.j2; the stage starts here
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files

import jinja2

from raytvb.evaluation.rows import rows_file
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import EVALS, PAGE, REPORT, SUMMARY
from raytvb.maths.counts import mean
from raytvb.report import numbers
from raytvb.report.formatting import format_bytes, percent
from raytvb.report.history import History, read_history
from raytvb.report.plot_style import short
from raytvb.report.plots import draw_plots
from raytvb.report.summary import summarise
from raytvb.report.summary_contracts import AdditionEntry, Interval, Summary
from raytvb.report.text import missing_lines
from raytvb.storage import records
from raytvb.storage.gram_rows import Arrival
from raytvb.storage.gram_state import GramState
from raytvb.storage.sealed_json import json_bytes
from raytvb.storage.store import Store

LAST_ARRIVALS = 50
"""The page shows this many of the vectors that were made, the last ones."""

_NO_ARRIVALS = History()

_OBJECTIVES = {
    "subsets": "the mean accuracy of additions, where each number of tasks added weighs the same",
    "all": "the mean accuracy of the addition of all tasks",
    "single": "the mean accuracy of the tasks, each added alone",
}


def write_report(store: Store, experiment: Experiment) -> Summary:
    """Write the page, the summary and their record, and return the summary.

    Raises UserError if results are missing; the message names the stage to run.
    """
    summary = summarise(store, experiment)
    history = GramState.read(store).history
    page = render(summary, experiment.name, history, read_history(store)).encode()
    files = {PAGE: page, SUMMARY: json_bytes(summary.to_json())}
    records.commit(store, REPORT, identity={}, files=files, parents=_parents(store))
    return summary


def _parents(store: Store) -> dict[str, str]:
    """Checksums of the results that the report shows, by their folders."""
    parents: dict[str, str] = {}
    for prefix, record in records.find_all(store, EVALS).items():
        parents[prefix] = rows_file(record, store.where(prefix)).sha256
    return parents


def render(
    summary: Summary,
    name: str,
    history: Sequence[Arrival],
    arrivals: History = _NO_ARRIVALS,
) -> str:
    """The HTML page of a summary. Plots are inline, and the page loads no other file.

    Args:
        name: name of the experiment.
        history: least errors after each vector that arrived.
        arrivals: when vectors were made, and what online bases lost then.
    """
    negation_figures = {}
    for subject, negations in numbers.negations(summary).items():
        negation_figures[subject] = numbers.negation_figures(negations)
    return _template().render(
        name=name,
        summary=summary,
        plots=draw_plots(summary, history),
        missing=list(missing_lines(summary)),
        headline=numbers.headline(summary),
        subjects=numbers.subjects(summary),
        subset_sizes=numbers.subset_sizes(summary),
        objective=_OBJECTIVES[summary.search.objective_of],
        on_test=_objectives_on_test(summary),
        negation_figures=negation_figures,
        arrivals=arrivals,
        last_arrivals=LAST_ARRIVALS,
        embedded=all(task.startswith("glyphs/") for task in summary.tasks),
        **_tables_of_additions(summary),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "bytes": format_bytes,
        "interval": _interval,
        "short": short,
        "mean": _mean,
        "overall": numbers.overall,
    }
    source = files("raytvb.report") / "page.html.j2"
    return environment.from_string(source.read_text(encoding="utf-8"))


def _interval(ends: Interval) -> str:
    return "–".join(map(percent, ends))


def _mean(values: Iterable[float]) -> float:
    return mean(list(values))


def _objectives_on_test(summary: Summary) -> dict[str, float]:
    """The objective of the search on the test split, for the candidates on the front."""
    objectives = {}
    for name in summary.search.front:
        if name in summary.addition:  # a candidate that stopped early may not have been tested
            entry = summary.addition[name]
            objectives[name] = numbers.objective_on_test(summary, entry)
    return objectives


def _tables_of_additions(summary: Summary) -> dict[str, dict[str, AdditionEntry]]:
    """The candidates of each table of the page.

    `added` has those that add tasks, `merged` those that merge tasks by another method, and
    `weighted` those with several coefficients.
    """
    added: dict[str, AdditionEntry] = {}
    merged: dict[str, AdditionEntry] = {}
    weighted = {}
    for name, entry in summary.addition.items():
        table = added if entry.merge in ("decoded", "sum") else merged
        table[name] = entry
        if entry.weighted is not None:
            weighted[name] = entry
    return {"added": added | summary.random_subset, "merged": merged, "weighted": weighted}
