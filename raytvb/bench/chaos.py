"""Benchmark of faults: a whole run on a cluster whose processes are killed and whose store fails.

A quiet run of an experiment on a local folder gives the reference: its bits and its time. Then the
same experiment runs on the same cluster, with a store on an S3 server behind a proxy that makes
requests fail. Meanwhile workers, basis actors, nodes and the driver are killed with SIGKILL.

Read the files in this order: `chaos_experiment` has the tasks, `chaos_store` the store that fails,
`chaos_cluster` and `chaos_driver` the processes, `chaos_kills` kills them and `chaos_runs` runs it
all. Then `chaos_requests` tells from the requests to the store what was done twice,
`chaos_compare` compares the results, and `chaos_result` has the figures.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from raytvb.bench.chaos_cluster import Cluster, cluster_environment
from raytvb.bench.chaos_compare import Comparison, compare
from raytvb.bench.chaos_experiment import chaos_experiment, draw_tasks
from raytvb.bench.chaos_result import ChaosResult, Redone, recoveries
from raytvb.bench.chaos_runs import Disturbed, Plan, Runs, Tell
from raytvb.bench.chaos_store import WatchedStore, watched_store
from raytvb.bench.measure import Machine, versions
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import vector_prefix
from raytvb.experiment.metrics import VectorMetrics
from raytvb.models.worker_process import device
from raytvb.storage import records
from raytvb.storage.store import Store


def bench_chaos(
    tasks: int,
    *,
    minutes: float = 30.0,
    every: float = 5.0,
    steps: int = 100,
    checkpoint: float = 0.5,
    nodes: int = 3,
    failing: float = 0.1,
    store: str | None = None,
    seed: int = 0,
    tell: Tell = lambda message: None,
) -> tuple[ChaosResult, Comparison]:
    """Run an experiment quietly, then with kills and failing requests, and compare.

    Args:
        tasks: number of tasks, drawn on the spot.
        minutes: longest time in which something is killed. Afterwards the run may finish.
        every: mean seconds between kills.
        steps: training steps of each fine-tune.
        checkpoint: seconds between the checkpoints of a fine-tune.
        nodes: number of nodes with one CPU each, beside the head.
        failing: share of the requests to the store that fail.
        store: URL of an empty store; default: a bucket of an S3 server that is started here.
        seed: of kills and failing requests.
        tell: called with a line about the progress from time to time.

    Raises UserError if something that is needed is not installed, if the store is not empty, and if
    the run fails again and again.
    """
    plan = Plan(minutes, every, failing, seed)
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="raytvb-chaos-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        images = folder / "images"
        draw_tasks(images, tasks)
        quiet = chaos_experiment(str(folder / "quiet"), images, tasks, steps, checkpoint)
        watched = stack.enter_context(watched_store(store, folder / "s3", seed))
        disturbed = quiet.model_copy(update={"store": watched.url})
        environment = cluster_environment(os.environ)
        cluster = stack.enter_context(Cluster(nodes, environment))
        runs = Runs(folder, cluster, environment, tell)
        quiet_s = runs.run_quietly(quiet)
        tell(f"the quiet run took {quiet_s:.0f} s")
        happened = runs.run_disturbed(disturbed, watched, plan)
        tell(f"the disturbed run took {happened.seconds:.0f} s")
        found = compare(disturbed, Store(quiet.store), Store(watched.url))
        return _result(disturbed, nodes, plan, quiet_s, happened, watched, found), found


def _result(
    experiment: Experiment,
    nodes: int,
    plan: Plan,
    quiet_s: float,
    happened: Disturbed,
    watched: WatchedStore,
    found: Comparison,
) -> ChaosResult:
    metrics, log, kills = _metrics(experiment), watched.log, happened.kills
    slower = happened.seconds - quiet_s
    return ChaosResult(
        tasks=len(experiment.tasks),
        steps=sum(vector.steps for vector in metrics.values()),
        nodes=nodes,
        every_s=plan.every_s,
        seed=plan.seed,
        kills=dict(Counter(kill.kind for kill in kills)),
        requests=happened.requests,
        failing_requests=happened.failing_requests,
        lost=len(found.lost),
        duplicated=len(found.duplicated),
        differing=len(found.differing),
        redone=None if log is None else Redone.of(log, kills, metrics),
        failed_runs=happened.failed_runs,
        quiet_s=quiet_s,
        disturbed_s=happened.seconds,
        seconds_per_kill=slower / len(kills) if kills else None,
        recovery=None if log is None else recoveries(log, kills, metrics),
        machine=Machine.this(device(), 1),
        versions=versions(),
    )


def _metrics(experiment: Experiment) -> dict[str, VectorMetrics]:
    """What the records of the finished vectors say, by task."""
    store, metrics = Store(experiment.store), {}
    for task in experiment.task_names:
        prefix = vector_prefix(task)
        record = records.find(store, prefix)
        if record is not None:
            metrics[task] = record.metrics_as(VectorMetrics, store.where(prefix))
    return metrics
