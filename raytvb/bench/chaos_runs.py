"""The quiet run of the chaos benchmark, and the disturbed one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import yaml

from raytvb.bench.chaos_cluster import Cluster
from raytvb.bench.chaos_driver import Driver
from raytvb.bench.chaos_kills import Kill, Killer
from raytvb.bench.chaos_store import WatchedStore
from raytvb.experiment.config import Experiment

TICK_S = 0.1
"""How often a run is looked at."""

TELL_S = 30.0
"""How often its progress is told."""

Tell: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How a run is disturbed."""

    minutes: float
    """Longest time in which something is killed."""
    every_s: float
    """Mean seconds between kills."""
    failing: float
    """Share of the requests that fail."""
    seed: int


@dataclass(frozen=True)
class Disturbed:
    """What happened in a disturbed run."""

    seconds: float
    kills: tuple[Kill, ...]
    failed_runs: tuple[str, ...]
    """Last words of drivers that failed by themselves."""
    requests: int | None
    failing_requests: dict[str, int] | None
    """By the way in which they failed."""


class Runs:
    """Runs experiments on one cluster, one after the other."""

    def __init__(
        self, folder: Path, cluster: Cluster, environment: Mapping[str, str], tell: Tell
    ) -> None:
        """folder: for experiment files and logs. environment: of the cluster's processes.

        tell: called with lines about the progress.
        """
        self._folder, self._cluster, self._tell = folder, cluster, tell
        self._environment = {**environment, "RAY_ADDRESS": cluster.address}

    def run_quietly(self, experiment: Experiment) -> float:
        """Seconds of a run without any disturbance."""
        driver = self._driver(experiment, "quiet")
        try:
            return self._wait(driver, lambda: None)
        finally:
            driver.close()

    def run_disturbed(self, experiment: Experiment, watched: WatchedStore, plan: Plan) -> Disturbed:
        """Run with kills and failing requests."""
        driver, proxy = self._driver(experiment, "disturbed"), watched.proxy
        killer = Killer(self._cluster, driver, plan.every_s, plan.seed)
        deadline = time.monotonic() + 60 * plan.minutes
        told = time.monotonic()

        def disturb() -> None:
            nonlocal told
            now = time.monotonic()
            if now < deadline:
                killer.step()
            if now - told > TELL_S:
                told = now
                self._tell(f"{len(killer.kills)} kills, {_progress(watched)}")

        try:
            if proxy is not None:
                proxy.share = plan.failing
            seconds = self._wait(driver, disturb)
        finally:
            driver.close()
            if proxy is not None:
                proxy.share = 0.0
        return Disturbed(
            seconds,
            tuple(killer.kills),
            tuple(driver.failures),
            None if proxy is None else proxy.requests,
            None if proxy is None else dict(sorted(proxy.failed.items())),
        )

    def _driver(self, experiment: Experiment, name: str) -> Driver:
        file = self._folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(experiment.model_dump(mode="json")), encoding="utf-8")
        return Driver(file, self._environment, self._folder / f"{name}.log")

    def _wait(self, driver: Driver, disturb: Callable[[], None]) -> float:
        """Call `disturb` until the driver has done its work. Returns the seconds."""
        started, failures = time.monotonic(), 0
        while not driver.is_done():
            if len(driver.failures) > failures:
                failures = len(driver.failures)
                self._tell(f"the run failed, and is started again: {driver.failures[-1]}")
            self._cluster.mend()
            disturb()
            time.sleep(TICK_S)
        return time.monotonic() - started


def _progress(watched: WatchedStore) -> str:
    if watched.log is None:
        return "working"
    committed = 0
    for history in list(watched.log.events.values()):
        committed += any(event.kind == "committed" for event in history)
    return f"{committed} vectors"
