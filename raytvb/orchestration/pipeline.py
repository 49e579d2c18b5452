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
from raytvb.errors import UserError
from raytvb.experiment.changes import Changes, changes_of
from raytvb.experiment.config import Experiment
from raytvb.experiment.missing import EVALUATE, LATER, raise_missing
from raytvb.experiment.places import check_new_store, check_usable
from raytvb.experiment.present_experiments import check_model, record_experiment
from raytvb.orchestration.basis_stage import build_bases, no_vectors
from raytvb.orchestration.connect import connect, preflight
from raytvb.orchestration.evaluate_stage import evaluate
from raytvb.orchestration.finetune_stage import finetune
from raytvb.orchestration.progress import Reporter
from raytvb.orchestration.run_context import ImagesMissingError, RunContext
from raytvb.orchestration.search_stage import search
from raytvb.orchestration.verify_store import verify_on_ray
from raytvb.report.page import write_report
from raytvb.report.timings import add_timing
from raytvb.storage.store import Store
from raytvb.storage.verify import ORPHANED

STAGES = ("finetune", "basis", "search", "evaluate", "report")


class Pipeline:
    """One experiment on one connected Ray cluster."""

    def __init__(self, experiment: Experiment, reporter: Reporter, changes: Changes) -> None:
        """Checks the store and the cluster before any work.

        changes: what the user was told that the run does. Raises StoreError or UserError if the
        store or the cluster cannot be used.
        """
        self._context = RunContext(experiment, reporter, renews_mask=changes.renews)
        check_usable(self.store)
        record_experiment(self.store, self._context.experiment, grows=changes.grows)
        preflight(self._context.experiment, reporter.say)

    @property
    def store(self) -> Store:
        """The store that holds everything that the experiment makes."""
        return self._context.store

    def run(self, stages: Sequence[str] = STAGES) -> None:
        """Run the given stages in the order of STAGES.

        A task that fails is left out, and the others go on. Raises PartialRunError at the end if
        tasks are missing, and UserError if a stage fails.
        """
        context = self._context
        evaluates = "search" in stages or "evaluate" in stages
        context.splits = SPLITS if evaluates else SPLITS[:1]
        context.measured_splits = SPLITS[1:] if "evaluate" in stages else SPLITS[1:2]
        if "finetune" in stages:
            self._timed("finetune", lambda: finetune(context, stream="basis" in stages))
        if set(stages) - {"finetune"}:
            if evaluates:
                context.retry_images()
                context.failures.clear(context.failures.at(EVALUATE), EVALUATE)
            self._use_vectors(stages)
        self._raise_missing(stages)

    def _use_vectors(self, stages: Sequence[str]) -> None:
        """Run the stages after fine-tuning, on the tasks that are there.

        If images of a task turn out to be missing, they are run again without that task.
        """
        context, problem = self._context, None
        while True:
            context.leave_out_missing()
            if not context.experiment.tasks:
                raise problem or no_vectors(context)
            try:
                return self._run_with(stages)
            except ImagesMissingError as error:
                problem = error

    def _run_with(self, stages: Sequence[str]) -> None:
        context = self._context
        if "basis" in stages:
            self._timed("basis", lambda: build_bases(context))
        if context.has_too_few:
            return
        if "search" in stages:
            self._timed("search", lambda: search(context))
        if "evaluate" in stages:
            self._timed("evaluate", lambda: evaluate(context))
        if "report" in stages:
            write_report(self.store, context.whole)

    def _raise_missing(self, stages: Sequence[str]) -> None:
        """Raise PartialRunError if something is missing that these stages were to make."""
        context = self._context
        parts = context.missing_parts()
        if set(stages) == {"finetune"}:
            parts = [part for part in parts if part.stage not in LATER]
        raise_missing(self.store, context.whole, parts)

    def verify(self) -> int:
        """Check every stored file, in Ray tasks. Returns the number of files with a checksum.

        Files of no record, which killed writers leave, are told and not an error. Raises UserError
        that names the files that are missing or damaged, if there are any.
        """
        context = self._context
        findings = verify_on_ray(self.store, context.whole, context.reporter)
        orphans = [problem for problem in findings.problems if problem.kind == ORPHANED]
        for problem in orphans:
            context.reporter.say(f"note: {problem}")
        findings.problems = [p for p in findings.problems if p.kind != ORPHANED]
        if findings.messages():
            raise UserError(
                "the store does not match its records:\n  "
                + "\n  ".join(findings.messages())
                + f"\n`raytvb verify {self.store.url} --repair` removes what is damaged"
            )
        return findings.checked

    def _timed(self, stage: str, work: Callable[[], bool]) -> None:
        """Run a stage, and add its seconds to those in the store unless it had nothing to do."""
        started = time.perf_counter()
        if work():
            add_timing(self.store, stage, time.perf_counter() - started)


def run(
    experiment: Experiment,
    stages: Sequence[str] = STAGES,
    *,
    reporter: Reporter | None = None,
    replace: bool = False,
    renew_mask: bool = False,
) -> None:
    """Run stages of an experiment. What is in the store already is not made again.

    replace: whether vectors may be replaced that were made with other settings, and whether a task
    may be new that looks like a renamed one. renew_mask: make the shared mask anew, and with it all
    vectors and bases.

    Uses the Ray that this process is connected to. Otherwise joins the cluster that RAY_ADDRESS
    names, or starts a Ray on this machine. Raises PartialRunError at the end if tasks failed: its
    `failed` lists them, and everything else is done. Raises UserError if a stage fails, and for a
    run that needs `replace`.
    """
    changes = planned_changes(experiment, stages, renew_mask=renew_mask)
    question = changes.question()
    if question and not replace:
        raise UserError(f"{question}\nSay `replace=True` to go on.")
    connect(retries=experiment.resources.max_retries)
    Pipeline(experiment, reporter or Reporter(), changes).run(stages)


def planned_changes(
    experiment: Experiment, stages: Sequence[str] = STAGES, *, renew_mask: bool = False
) -> Changes:
    """What a run would make, keep and make again. Nothing is written.

    Raises StoreError or UserError for a store that cannot be used, or that is of another model.
    """
    experiment.resources.apply_to_storage()
    store = Store(experiment.store)
    store.check_reachable()
    check_new_store(store)
    check_model(store, experiment)
    changes = changes_of(experiment, renew_mask=renew_mask)
    changes.check_borrowed()
    return changes if "finetune" in stages else changes.without_vectors()
