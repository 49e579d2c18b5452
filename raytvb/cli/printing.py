"""Prints tables on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from raytvb.report.summary_contracts import Summary
    from raytvb.storage.contract import JsonObject
    from raytvb.storage.store import Store


def wide_console(least: int) -> Console:
    """A console on standard output that is at least `least` columns wide.

    A log is no terminal, so its width is not known, and rich would assume a narrow one.
    """
    from rich.console import Console

    return Console(width=max(least, Console().width), highlight=False)


def print_results(store: Store) -> None:
    """Print the results in a store's summary as a table."""
    from raytvb.report.summary_contracts import read_summary

    print_summary(read_summary(store))


def print_summary(summary: Summary) -> None:
    """Print the results as a table."""
    from rich.table import Table

    from raytvb.report.numbers import subset_sizes
    from raytvb.report.text import summary_lines

    sizes = subset_sizes(summary)
    table = Table(title="Test accuracy, %: tasks added from …", title_justify="left")
    table.add_column("vectors")
    partial = [f"{size} added" for size in sizes[:-1]]
    for column in ("error", f"all {len(summary.tasks)}", *partial, "subsets", "bytes"):
        table.add_column(column, justify="right")
    bases = sorted(name for name in summary.addition if name != "full")
    for name in ("full", *bases, *sorted(summary.random_subset)):
        table.add_row(*_cells(summary, name, sizes))
    wide_console(110).print(table)
    for line in summary_lines(summary):
        print(line)


def _cells(summary: Summary, name: str, sizes: Sequence[int]) -> list[str]:
    """The row of one candidate."""
    from raytvb.report.formatting import format_bytes, percent
    from raytvb.report.numbers import overall

    entry = summary.addition.get(name) or summary.random_subset[name]
    label = name
    if name == summary.chosen.name:
        label += " *"
    if name in summary.search.front:
        label += " +"
    complete = len(entry.subsets) == len(sizes)
    return [
        label,
        f"{entry.relative_error:.3f}",
        percent(entry.mean),
        *(percent(entry.subsets.get(size)) for size in sizes[:-1]),
        percent(overall(entry)) if complete else percent(None),
        format_bytes(entry.stored_bytes),
    ]


def print_result(fields: JsonObject, as_json: bool) -> None:
    """Print the fields of a result as one JSON object, or as a table."""
    if as_json:
        print(json.dumps(fields, indent=1))
    else:
        print_fields(fields)


def print_fields(fields: JsonObject) -> None:
    """Print a JSON object as a table of dotted names and values."""
    from rich.table import Table

    table = Table(box=None, show_header=False)
    for name, value in _flattened("", fields):
        table.add_row(name, value)
    wide_console(110).print(table, markup=False)


def _flattened(name: str, value: object) -> list[tuple[str, str]]:
    """The dotted name and the printed value of every leaf of a JSON value."""
    match value:
        case dict():
            items = list(value.items())
        case list():
            items = list(enumerate(value))
        case None:
            return [(name, "not measured")]
        case bool() | str():
            return [(name, str(value))]
        case int():
            return [(name, f"{value:,}")]
        case _:
            return [(name, f"{value:.4g}")]
    rows = []
    for key, inner in items:
        rows += _flattened(f"{name}.{key}" if name else str(key), inner)
    return rows


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is removed or replaced. Ends the command unless the answer is yes.

    yes: whether the user has said `--yes`, so that nothing is asked. Raises UserError, which names
    that option, if nobody is there to answer.
    """
    import click

    from raytvb.errors import UserError

    if yes:
        return
    try:
        click.confirm(question, abort=True, err=True)
    except (click.Abort, OSError, ValueError):  # the latter two: standard input is closed
        if _is_terminal():
            raise
        raise UserError(f"nothing was done. Say `--yes` to agree to this:\n{question}") from None


def _is_terminal() -> bool:
    """Whether somebody may answer on standard input."""
    try:
        return sys.stdin.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False
