"""Benchmark of a store that grows: what one more task costs, beside a run on all tasks.

The embedded suite gives the tasks. Both runs go up to the bases. Each starts a process and a Ray;
this start is measured by itself, so that it can be subtracted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from raytvb.bench.growth_compare import Contents, Identical, identical
from raytvb.bench.measure import CPU, Machine, Result, versions
from raytvb.bench.search_experiment import make_bases, record_of
from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import vector_prefix
from raytvb.experiment.metrics import VectorMetrics
from raytvb.experiment.parsing import parse_experiment
from raytvb.storage.contract import Contract
from raytvb.storage.store import Store
from raytvb.suite.task_names import task_names

SIZES = (4, 16)
"""Basis sizes, as far as there are so many tasks."""

START = """
import ray
from raytvb.orchestration.connect import connect
connect()
ray.shutdown()
"""


class WholeRun(Contract):
    """A run on all tasks but the last, in an empty store."""

    algorithm: str = "a run on all tasks, in an empty store"
    seconds: float
    fine_tunes: int
    stages: dict[str, float]
    """Seconds of each stage."""


class Addition(Contract):
    """A run of the same experiment with one task more, in the same store."""

    algorithm: str = "a run of the same experiment with one task more, in the same store"
    seconds: float
    fine_tune_seconds: float
    """Seconds of the training of the new task, without reading its images."""
    fine_tunes: int
    stages: dict[str, float]
    """Seconds of each stage."""
    gram_rows: int
    """Rows that were added to the Gram matrix."""
    changed_vectors: int
    """Vectors of earlier tasks whose record is another one than before."""


class GrowthResult(Result):
    """Seconds of one more task beside those of the whole run."""

    tasks: int
    """Number of tasks before the addition."""
    start_seconds: float
    """Seconds in which a process starts, starts Ray, and stops."""
    reference: WholeRun
    ours: Addition
    rest: float
    """Seconds of the addition without its training and the start."""
    share: float
    """`rest` divided by the seconds of the whole run without the start."""
    identical: Identical

    @property
    def is_sound(self) -> bool:
        """Whether all bits are the same."""
        return self.identical.is_all


def bench_growth(tasks: int = 200) -> GrowthResult:
    """Measure a run on `tasks` tasks of the embedded suite, and then one more task.

    Everything is made in a temporary folder, which is removed at the end.
    """
    with tempfile.TemporaryDirectory(prefix="raytvb-bench-") as place:
        folder = Path(place)
        first, more = (_experiment(folder / "store", tasks, count) for count in (tasks, tasks + 1))
        start_s = _seconds_of(_start)
        whole_s = _seconds_of(lambda: make_bases(first, folder))
        before = Contents.of(first)
        addition_s = _seconds_of(lambda: make_bases(more, folder))
        after = Contents.of(more)
        ours = _addition(more, addition_s, before, after)
        same = identical(more, folder / "fresh", before, after)
    rest = addition_s - start_s - ours.fine_tune_seconds
    threads = max(1, int(first.resources.cpus_per_task))
    return GrowthResult(
        benchmark="growth",
        tasks=tasks,
        start_seconds=start_s,
        reference=WholeRun(
            seconds=whole_s, fine_tunes=len(before.vector_records()), stages=before.stages
        ),
        ours=ours,
        rest=rest,
        share=rest / (whole_s - start_s),
        identical=same,
        ratio=whole_s / addition_s,
        machine=Machine.this(CPU, threads),
        versions=versions(),
    )


def _experiment(store: Path, tasks: int, count: int) -> Experiment:
    """The first `count` tasks of the suite. tasks: their number before the addition."""
    fields = {
        "name": "bench-growth",
        "store": str(store),
        "tasks": list(task_names()[:count]),
        "data": {"leaks": "ignore"},
        "talos": {"images": 32, "rounds": 1},
        "finetune": {"epochs": 1, "batch_size": 256},
        "basis": {"method": ["ae-anchored", "svd"], "online": True},
        "search": {"sizes": sorted({min(size, tasks - 1) for size in SIZES})},
    }
    return parse_experiment(fields, "bench growth")


def _seconds_of(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _start() -> None:
    """Start a process that starts a Ray, as `make_bases` does, and stops it."""
    environment = dict(os.environ)
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", START]
    if subprocess.run(command, stdout=2, env=environment, check=False).returncode:
        raise UserError("Ray could not be started: the reason is above")


def _addition(
    experiment: Experiment, seconds: float, before: Contents, after: Contents
) -> Addition:
    """What the addition of the last task took and made."""
    old, new = before.vector_records(), after.vector_records()
    changed = [key for key in old if new.get(key) != old[key]]
    added = new.keys() - old.keys()
    prefix = vector_prefix(experiment.task_names[-1])
    where = Store(experiment.store).where(prefix)
    metrics = record_of(experiment, prefix).metrics_as(VectorMetrics, where)
    stages = {name: total - before.stages.get(name, 0.0) for name, total in after.stages.items()}
    return Addition(
        seconds=seconds,
        fine_tune_seconds=metrics.seconds,
        fine_tunes=len(added) + len(changed),
        stages=stages,
        gram_rows=len(after.gram.tasks) - len(before.gram.tasks),
        changed_vectors=len(changed),
    )
