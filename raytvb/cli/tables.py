"""Tables on standard output."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def wide_console(least: int) -> Console:
    """Standard output with room for a table: in a log there is no terminal whose width would be
    known.
    """
    return Console(width=max(least, Console().width), highlight=False)


def print_summary(summary: dict[str, Any]) -> None:
    """The results as a table on standard output."""
    from raytvb.maths.counts import mean
    from raytvb.report.formatting import format_bytes
    from raytvb.report.text import subset_sizes, summary_lines

    sizes = subset_sizes(summary)
    table = Table(title="Test accuracy, %: tasks added from …", title_justify="left")
    for column in (
        "vectors",
        "error",
        f"all {len(summary['tasks'])}",
        *(f"{s} added" for s in sizes[:-1]),
        "subsets",
        "bytes",
    ):
        table.add_column(column, justify="left" if column == "vectors" else "right")
    rows = summary["addition"] | summary["random_subset"]
    marks = {"*": [summary["chosen"]["name"]], "+": summary.get("search", {}).get("front", [])}
    for name in (
        "full",
        *sorted(n for n in summary["addition"] if n != "full"),
        *sorted(summary["random_subset"]),
    ):
        entry = rows[name]
        parts = [
            f"{100 * entry['subsets'][s]:.1f}" if s in entry["subsets"] else "–" for s in sizes[:-1]
        ]
        overall = (
            f"{100 * mean(list(entry['subsets'].values())):.1f}"
            if len(entry["subsets"]) == len(sizes)
            else "–"
        )
        table.add_row(
            " ".join([name, *(m for m, names in marks.items() if name in names)]),
            f"{entry['relative_error']:.3f}",
            f"{100 * entry['mean']:.1f}",
            *parts,
            overall,
            format_bytes(entry["stored_bytes"]),
        )
    wide_console(110).print(table)
    for line in summary_lines(summary):
        print(line)
