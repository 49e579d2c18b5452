"""What the requests that reached the store tell of a run: which fine-tunes began, were cut off and
began again.

Nothing of this is counted by the product itself. A training begins when it asks the store for
a checkpoint; it stores checkpoints; it ends when its record is written.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias
from urllib.parse import unquote

from raytvb.bench.chaos_kills import Kill, Victim
from raytvb.experiment.metrics import VectorMetrics

EventKind: TypeAlias = Literal["begun", "saved", "committed"]

OWNER = "gram/owner.json"
"""A basis actor writes this file before it changes the Gram matrix for the first time."""

CHECKPOINT = re.compile(r"vectors/(?P<task>.+)/checkpoint/(?P<name>[^/]+)")
VECTOR = re.compile(r"vectors/(?P<task>.+)/record\.json")
STEP = re.compile(r"step-(\d+)\.")

LINGER_S = 3.0
"""How long after a kill the last requests of a training may be answered."""


@dataclass(frozen=True)
class Event:
    """Something that happened to the fine-tune of a task."""

    kind: EventKind
    time: float
    """On the monotonic clock, in seconds."""
    step: int = 0
    """Steps that need not be done again: those in the latest checkpoint."""


@dataclass(frozen=True)
class Cut:
    """A training that ended before it had finished, and that began again later."""

    task: str
    kill: Kill | None
    """None if nothing was killed, so that the training ended by itself."""
    steps: float
    """Steps that were lost."""
    time: float
    """When it ended, on the monotonic clock."""


class RequestLog:
    """Watches the requests to one store, in the order in which they were answered."""

    def __init__(self, root: str) -> None:
        """root: bucket and prefix of the store."""
        self._root = f"/{root.strip('/')}/"
        self.events: dict[str, list[Event]] = defaultdict(list)
        """By task, in the order of time."""
        self.claims: list[float] = []
        """When a basis actor took over the Gram matrix."""
        self._steps: dict[str, int] = defaultdict(int)
        self._written: dict[str, int] = defaultdict(int)

    def answered(self, method: str, path: str, status: int, fault: str) -> None:
        """Take note of a request that reached the server.

        path: with the query. status: the server's answer. fault: how that answer was spoiled on
        its way to the client; '' if it was not.
        """
        key = unquote(path.partition("?")[0])
        if not key.startswith(self._root):
            return
        key, stored = key.removeprefix(self._root), method == "PUT" and status < 300
        if stored and key == OWNER:
            self.claims.append(time.monotonic())
        if match := CHECKPOINT.fullmatch(key):
            self._checkpoint(match["task"], match["name"], stored, method == "GET" and not fault)
        elif stored and (match := VECTOR.fullmatch(key)):
            self._add(match["task"], "committed")

    def _checkpoint(self, task: str, name: str, stored: bool, read: bool) -> None:
        step = STEP.match(name)
        if stored and step:
            self._written[task] = int(step[1])
        elif stored and name == "record.json":
            self._steps[task] = self._written[task]
            self._add(task, "saved")
        elif read and name == "record.json":
            self._add(task, "begun")

    def _add(self, task: str, kind: EventKind) -> None:
        self.events[task].append(Event(kind, time.monotonic(), self._steps[task]))


def restarted(events: Mapping[str, Sequence[Event]]) -> list[str]:
    """The tasks whose training began more than once."""
    return [task for task, history in sorted(events.items()) if len(_begun(history)) > 1]


def _begun(history: Sequence[Event]) -> list[Event]:
    return [event for event in history if event.kind == "begun"]


def find_cuts(
    events: Mapping[str, Sequence[Event]],
    kills: Sequence[Kill],
    metrics: Mapping[str, VectorMetrics],
) -> Iterator[Cut]:
    """The trainings that were cut off.

    A training is taken to be cut by the first kill after its last sign of life. It loses the time
    between the two, in which it made steps as fast as on average. The kill that cut it may have
    been a later one, but not by more than the time between two checkpoints.
    metrics: of the finished vectors.
    """
    for task, history in sorted(events.items()):
        if task not in metrics:
            continue
        total, pace = metrics[task].steps, metrics[task].seconds / metrics[task].steps
        for last, event in pairwise(history):
            if event.kind != "begun":
                continue
            kill = _cutting_kill(kills, last.time, event.time)
            ended = event.time if kill is None else max(last.time, kill.time)
            steps = min((ended - last.time) / pace, total - last.step)
            if last.kind == "committed":
                steps = total  # it was finished, and is made again
            yield Cut(task, kill, steps, ended)


def _cutting_kill(kills: Sequence[Kill], last: float, end: float) -> Kill | None:
    """The kill that cut a training. last: time of its last sign of life. end: when it went on."""
    possible = [kill for kill in kills if kill.kind != "actor"]
    before = [kill for kill in possible if last - LINGER_S < kill.time <= last]
    after = [kill for kill in possible if last < kill.time < end]
    # The death of a driver ends all trainings, a little later.
    drivers = [kill for kill in before if kill.kind == "driver"]
    return next(iter([*drivers, *after, *before]), None)


def training_recoveries(
    events: Mapping[str, Sequence[Event]], cuts: Sequence[Cut], kills: Sequence[Kill]
) -> Iterator[tuple[Victim, float]]:
    """For each kill that cut a training: the kind of victim, and the seconds until as many
    fine-tunes were training as before the kill.

    Kills after which there were never as many again are left out, such as those near the end.
    """
    changes = [(cut.time, -1) for cut in cuts]
    for history in events.values():
        for event in history:
            if event.kind != "saved":
                changes.append((event.time, 1 if event.kind == "begun" else -1))
    changes.sort()
    cutting = {cut.kill for cut in cuts}
    for kill in kills:
        if kill in cutting:
            before = sum(change for moment, change in changes if moment < kill.time)
            level = before
            for moment, change in changes:
                level += change if moment >= kill.time else 0
                if moment > kill.time and level >= before:
                    yield kill.kind, moment - kill.time
                    break


def actor_recoveries(claims: Sequence[float], kills: Sequence[Kill]) -> list[float]:
    """Seconds from each kill of a basis actor until the next one takes over the Gram matrix.

    Kills after which none had to are left out, and kills of an actor that had not taken over yet.
    """
    seconds = []
    for kill in kills:
        if kill.kind == "actor":
            after = [claim for claim in claims if claim > kill.time]
            if after:
                seconds.append(after[0] - kill.time)
    return seconds
