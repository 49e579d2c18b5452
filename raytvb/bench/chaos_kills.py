"""Kills real processes of a run at seeded random moments."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from raytvb.bench.chaos_cluster import ACTOR, WORKING, Cluster
from raytvb.bench.chaos_driver import Driver
from raytvb.bench.chaos_processes import kill

Victim: TypeAlias = Literal["worker", "actor", "node", "driver"]

DECK: tuple[Victim, ...] = ("worker",) * 8 + ("actor",) * 2 + ("node",) + ("driver",)
"""The kinds of victims are drawn like cards from this deck, which is shuffled again when it is
empty. Workers die most often, as on a real cluster.
"""

LEAST_NODES = 2
"""A node is killed only if this many are up."""


@dataclass(frozen=True)
class Kill:
    """A kill that took place."""

    kind: Victim
    time: float
    """On the monotonic clock, in seconds."""


class Killer:
    """Kills one victim after the other."""

    def __init__(self, cluster: Cluster, driver: Driver, every_s: float, seed: int) -> None:
        """every_s: mean seconds between kills; each pause is between half of that and 1.5 times."""
        self._cluster, self._driver, self._every_s = cluster, driver, every_s
        self._random = random.Random(seed)
        self._deck: list[Victim] = []
        self.kills: list[Kill] = []
        self._plan_next()

    def _plan_next(self) -> None:
        self._next = time.monotonic() + self._every_s * self._random.uniform(0.5, 1.5)

    def step(self) -> None:
        """Kill a victim if it is time to."""
        if time.monotonic() < self._next:
            return
        if not self._deck:
            self._deck = list(DECK)
            self._random.shuffle(self._deck)
        # A kind that has no victim now stays in the deck for the next time.
        for kind in dict.fromkeys(self._deck):
            if self._strike(kind):
                self._deck.remove(kind)
                self._plan_next()
                return

    def _strike(self, kind: Victim) -> bool:
        """Kill something of a kind. Returns whether there was anything."""
        strikes: dict[Victim, Callable[[], bool]] = {
            "worker": lambda: self._kill_worker(*WORKING),
            "actor": lambda: self._kill_worker(ACTOR),
            "node": self._kill_node,
            "driver": self._kill_driver,
        }
        now = time.monotonic()
        if not strikes[kind]():
            return False
        self.kills.append(Kill(kind, now))
        return True

    def _kill_worker(self, *titles: str) -> bool:
        workers = self._cluster.workers(*titles)
        return bool(workers) and kill(self._random.choice(workers))

    def _kill_node(self) -> bool:
        nodes = self._cluster.nodes
        if len(nodes) < LEAST_NODES:
            return False
        self._cluster.kill_node(self._random.choice(nodes))
        return True

    def _kill_driver(self) -> bool:
        if not self._driver.is_running:
            return False
        self._driver.kill()
        return True
