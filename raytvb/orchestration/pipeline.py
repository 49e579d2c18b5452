"""A whole run: the stages of an experiment one after the other, on Ray.

This folder is the only one that imports Ray. Read its files in this order. `pipeline` has the order
of the stages, and `run_context` has what the stages share. The stages themselves are
`finetune_stage`, `basis_stage`, `search_stage` and `evaluate_stage`. Below those, `ray_tasks` turns
plain functions of other folders into Ray tasks, `ray_actors` and `stream` run the basis builder,
`tune` runs the search, and `evaluation_service` runs the evaluations. Beside them, `connect` joins
or starts a Ray, and `submit` sends an experiment to a cluster as a job.

A step that has a record in the store is not done again, so a run that was stopped goes on where it
stopped. The driver passes keys and small records. It never holds a vector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from raytvb.data.image_source import SPLITS
from raytvb.experiment.config import Experiment
from raytvb.experiment.freezing import freeze
from raytvb.experiment.layout import TIMINGS
from raytvb.orchestration.basis_stage import build_bases
from raytvb.orchestration.connect import connect, preflight
from raytvb.orchestration.evaluate_stage import evaluate
from raytvb.orchestration.finetune_stage import finetune
from raytvb.orchestration.progress import Reporter
from raytvb.orchestration.run_context import RunContext
from raytvb.orchestration.search_stage import search
from raytvb.orchestration.verify_store import verify_on_ray
from raytvb.report.page import write_report
from raytvb.report.timings import read_timings
from raytvb.storage.store import Store

STAGES = ("finetune", "basis", "search", "evaluate", "report")


class Pipeline:
    """One experiment on one connected Ray cluster."""

    def __init__(self, experiment: Experiment, reporter: Reporter) -> None:
        """Checks the store and the cluster before any work.

        Raises StoreError or UserError if one of them cannot be used.
        """
        self._context = RunContext(experiment, reporter)
        self.store.check_writable()
        freeze(self.store, self._context.experiment)
        preflight(self._context.experiment, reporter.say)

    @property
    def store(self) -> Store:
        """The store that holds everything that the experiment makes."""
        return self._context.store

    def run(self, stages: Sequence[str] = STAGES) -> None:
        """Run the given stages in the order of STAGES. Raises UserError if one fails."""
        context = self._context
        evaluates = "search" in stages or "evaluate" in stages
        context.splits = SPLITS if evaluates else SPLITS[:1]
        if "finetune" in stages:
            self._timed("finetune", lambda: finetune(context, stream="basis" in stages))
        if "basis" in stages:
            self._timed("basis", lambda: build_bases(context))
        if "search" in stages:
            self._timed("search", lambda: search(context))
        if "evaluate" in stages:
            self._timed("evaluate", lambda: evaluate(context))
        if "report" in stages:
            write_report(self.store, context.experiment)

    def verify(self) -> int:
        """Compare every stored file with its checksum, in Ray tasks. Returns the number of files.

        Raises UserError that names the damaged files, if there are any.
        """
        return verify_on_ray(self._context)

    def _timed(self, stage: str, work: Callable[[], bool]) -> None:
        """Run a stage, and add its seconds to those in the store unless it had nothing to do."""
        started = time.perf_counter()
        if work():
            timings = read_timings(self.store)
            timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - started
            self.store.write_json(TIMINGS, timings)


def run(
    experiment: Experiment, stages: Sequence[str] = STAGES, *, reporter: Reporter | None = None
) -> None:
    """Run stages of an experiment. What is in the store already is not made again.

    Uses the Ray that this process is connected to. Otherwise joins the cluster that RAY_ADDRESS
    names, or starts a Ray on this machine.
    """
    connect()
    Pipeline(experiment, reporter or Reporter()).run(stages)
