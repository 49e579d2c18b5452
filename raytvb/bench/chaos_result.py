"""What the chaos benchmark prints."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from raytvb.bench.chaos_kills import Kill
from raytvb.bench.chaos_requests import (
    RequestLog,
    actor_recoveries,
    find_cuts,
    restarted,
    training_recoveries,
)
from raytvb.bench.measure import Machine
from raytvb.experiment.metrics import VectorMetrics
from raytvb.storage.contract import Contract, JsonObject


class Redone(Contract):
    """Work that had to be done again, as seen from the store."""

    tasks: int
    """Fine-tunes whose training began more than once."""
    without_a_kill: int
    """How often a training ended early although nothing had been killed."""
    steps: float
    """Training steps that were lost; estimated from the times of kills and checkpoints."""
    percent: float
    """These steps in per cent of the steps that the experiment needs."""

    @classmethod
    def of(
        cls, log: RequestLog, kills: Sequence[Kill], metrics: Mapping[str, VectorMetrics]
    ) -> Redone:
        """From the requests to the store. metrics: of the finished vectors."""
        cuts = list(find_cuts(log.events, kills, metrics))
        lost = sum(cut.steps for cut in cuts)
        needed = sum(vector.steps for vector in metrics.values())
        return cls(
            tasks=len(restarted(log.events)),
            without_a_kill=sum(cut.kill is None for cut in cuts),
            steps=lost,
            percent=100 * lost / max(1, needed),
        )


class Recovery(Contract):
    """Seconds from a kill until the run was as far as before it.

    Of workers, nodes and drivers: until as many fine-tunes were training again. Of a basis actor:
    until the next one took over.
    """

    median_s: float
    longest_s: float


def recoveries(
    log: RequestLog, kills: Sequence[Kill], metrics: Mapping[str, VectorMetrics]
) -> dict[str, Recovery]:
    """By the kind of victim; kills that cut no work are left out."""
    seconds: dict[str, list[float]] = defaultdict(list)
    cuts = list(find_cuts(log.events, kills, metrics))
    for kind, value in training_recoveries(log.events, cuts, kills):
        seconds[kind].append(value)
    seconds["actor"] = actor_recoveries(log.claims, kills)
    found = {}
    for name, values in sorted(seconds.items()):
        if values:
            found[name] = Recovery(median_s=statistics.median(values), longest_s=max(values))
    return found


class ChaosResult(Contract):
    """What a run has survived, and what that has cost."""

    benchmark: str = "chaos"
    tasks: int
    steps: int
    """Training steps of all fine-tunes."""
    nodes: int
    every_s: float
    seed: int
    kills: dict[str, int]
    """By the kind of victim."""
    requests: int | None
    """Requests to the store; null without a proxy, like everything that is counted there."""
    failing_requests: dict[str, int] | None
    """Requests that failed, by the way in which they did."""
    lost: int
    """Vectors that are missing, or are not what their records say."""
    duplicated: int
    """Vectors that are counted twice in the Gram matrix, its arrivals or an online basis."""
    differing: int
    """Files whose bits are not those of the quiet run, and the Gram matrix if its bits are not."""
    redone: Redone | None
    failed_runs: tuple[str, ...]
    """Last words of drivers that failed by themselves, and were started again."""
    quiet_s: float
    """Duration of the quiet run."""
    disturbed_s: float
    """Duration of the disturbed run."""
    seconds_per_kill: float | None
    """Difference of these durations, divided by the number of kills."""
    recovery: dict[str, Recovery] | None
    machine: Machine
    versions: dict[str, str]

    def to_json(self) -> JsonObject:
        """All fields in the order of the class."""
        return {**super().to_json(), "machine": self.machine.to_json()}

    @property
    def is_sound(self) -> bool:
        """Whether nothing was lost, duplicated or changed."""
        return not (self.lost or self.duplicated or self.differing)
