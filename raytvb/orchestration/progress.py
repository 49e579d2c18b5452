"""Progress of a run: bars with the time left on a terminal, and plain lines elsewhere, such as in
the log of a Ray job.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Reporter:
    """Says on standard error how far a run is. Standard output is for results."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, message: str) -> None:
        """Print one line."""
        self.console.print(message, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        """Show a stage of `total` steps. Shows nothing if there are none."""
        if not self.console.is_terminal or not total:
            yield Stage(self, name, total)
            return
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as bars:
            yield Stage(self, name, total, bars, bars.add_task(name, total=total, note=""))


class Stage:
    """The steps of one stage."""

    def __init__(
        self,
        reporter: Reporter,
        name: str,
        total: int,
        bars: Progress | None = None,
        bar: TaskID | None = None,
    ) -> None:
        self._reporter, self._name, self._total = reporter, name, total
        self._bars, self._bar = bars, bar
        self._done, self._started = 0, time.monotonic()

    def advance(self, note: str) -> None:
        """Count one finished step. `note` says which step it was, and how it went."""
        self._done += 1
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, advance=1, note=note)
            return
        spent = time.monotonic() - self._started
        left = spent / self._done * (self._total - self._done)
        self._reporter.say(
            f"{self._name} {self._done}/{self._total}  {note}  "
            f"({spent:.0f} s, about {left:.0f} s left)"
        )
