"""The stages of an experiment, on Ray: fine-tune, basis, search, evaluate, report. What has a
record is not done again.

The driver passes keys and small records only; it never holds a vector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from raytvb.data.source import SPLITS
from raytvb.errors import UserError
from raytvb.evaluation.images import evaluation_split
from raytvb.evaluation.plan import evaluations
from raytvb.evaluation.rows import has_rows
from raytvb.experiment.config import Experiment
from raytvb.experiment.freezing import freeze
from raytvb.experiment.identities import base_identity, mask_identity, vector_identity
from raytvb.experiment.layout import (
    BASE,
    OVERLAP,
    PRECISION,
    SHARED_MASK,
    TIMINGS,
    mask_prefix,
    vector_prefix,
)
from raytvb.experiment.stored import basis_vector_record
from raytvb.experiment.tasks import TaskConfig
from raytvb.finetuning.masks import (
    add_scores,
    commit_shared_mask,
    record_overlap,
    score_task,
    select_round,
)
from raytvb.finetuning.prepared import prepare_vector
from raytvb.finetuning.task import finetune_task
from raytvb.models.base import prepare_base
from raytvb.orchestration.connect import connect, preflight
from raytvb.orchestration.progress import Reporter, Stage
from raytvb.orchestration.service import (
    Refs,
    Service,
    compare_precisions_on_refs,
    evaluate_group,
    evaluation_groups,
)
from raytvb.orchestration.stream import Stream
from raytvb.orchestration.tasks import collect, ray_array_task, ray_task
from raytvb.orchestration.tune import run_search
from raytvb.report.formatting import format_bytes
from raytvb.report.page import write_report
from raytvb.search.candidates import all_candidates, basis_candidates, candidate_bytes
from raytvb.search.decision import commit_decision, decide, is_measured
from raytvb.search.rounds import find_choice, find_result
from raytvb.storage import records
from raytvb.storage.store import Store

STAGES = ("finetune", "basis", "search", "evaluate", "report")


def _fail(stage: str, failed: dict[str, str]) -> None:
    if failed:
        lines = "\n  ".join(f"{name}: {reason}" for name, reason in sorted(failed.items()))
        raise UserError(
            f"{stage} failed for {len(failed)} of its parts, the rest is done and kept:\n  {lines}\n"
            f"Once the cause is removed, run the same command again to go on."
        )


def _warnings(metrics: dict[str, Any], experiment: Experiment) -> list[str]:
    """What a user should know of a fine-tune that went through."""
    warm, found = experiment.finetune.warmup, []
    if metrics.get("skipped"):
        found.append(f"{metrics['skipped']} images cannot be read and are left out")
    if metrics.get("classes_without_images"):
        found.append(f"{metrics['classes_without_images']} classes have no training images")
    if warm >= max(1, metrics["steps"]):
        found.append(f"its {metrics['steps']} steps end within the warm-up of {warm:g}")
    return found


class Pipeline:
    """One experiment on one connected Ray cluster."""

    def __init__(self, experiment: Experiment, reporter: Reporter) -> None:
        """Checks the store and the cluster before any work. Raises StoreError or UserError."""
        self.reporter, self.store = reporter, Store(experiment.store)
        # A relative path would mean another place in workers, which have other working folders.
        self.experiment = experiment.model_copy(update={"store": self.store.url})
        self.store.check_writable()
        freeze(self.store, self.experiment)
        preflight(self.experiment, reporter.say)
        self._splits: dict[str, Refs] = {}
        self._fingerprint = ""
        self._splits_needed: tuple[str, ...] = SPLITS
        self._stream: Stream | None = None

    def run(self, stages: Sequence[str] = STAGES) -> None:
        """Run the given stages in their order."""
        self._splits_needed = SPLITS if {"search", "evaluate"} & set(stages) else SPLITS[:1]
        if "finetune" in stages:
            self._timed("finetune", lambda: self.finetune(stream="basis" in stages))
        if "basis" in stages:
            self._timed("basis", self.basis)
        if "search" in stages:
            self._timed("search", self.search)
        if "evaluate" in stages:
            self._timed("evaluate", self.evaluate)
        if "report" in stages:
            write_report(self.store, self.experiment)

    def _timed(self, stage: str, work: Callable[[], bool]) -> None:
        """Run a stage and add its seconds to the store's, unless there was nothing to do."""
        started = time.perf_counter()
        if work():
            timings = self.store.read_json(TIMINGS) if self.store.exists(TIMINGS) else {}
            timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - started
            self.store.write_json(TIMINGS, timings)

    # Fine-tuning ----------------------------------------------------------------------------------

    def finetune(self, stream: bool) -> bool:
        """Masks, then one Ray task per task vector; each committed vector goes to the basis actor
        if `stream`.
        """
        missing = self._missing_vectors()
        self._prepare()
        if (
            missing
            and self.experiment.talos.mask == "shared"
            and self.experiment.talos.density < 1.0
        ):
            self._shared_mask()
        there = [t for t in self.experiment.tasks if t not in missing]
        failed = self._prepare_vectors(there) if stream else {}
        self._stream = Stream(self.experiment) if stream else None
        for task in there:
            if task.name not in failed and self._stream is not None:
                self._stream.offer(task.name)
        with self.reporter.stage("finetune", len(missing)) as stage:
            failed |= self._finetune_missing(missing, stage)
        if self._stream is not None:
            self._stream.finish()
            failed |= self._stream.failed
            if failed:
                self._stream.close()
        _fail("finetune", failed)
        if (
            self.experiment.own_masks
            and len(self.experiment.tasks) > 1
            and records.find(self.store, OVERLAP) is None
        ):
            call = ray_task(record_overlap, self.experiment, gpu=False).remote(self.experiment)
            _fail("mask overlap", collect({call: "masks"}))
        return bool(missing)

    def _missing_vectors(self) -> list[TaskConfig]:
        return [
            t
            for t in self.experiment.tasks
            if records.find(self.store, vector_prefix(t.name), vector_identity(self.experiment, t))
            is None
        ]

    def _prepare_vectors(self, tasks: Sequence[TaskConfig]) -> dict[str, str]:
        """Prepared twins of committed vectors that have none, where bases are made of those; name
        to reason of failed.

        A fine-tune makes its own: these are of a run that was killed in between, or were deleted.
        """
        if self.experiment.basis.prepare == "none":
            return {}
        missing = [
            t for t in tasks if basis_vector_record(self.store, self.experiment, t.name) is None
        ]
        call = ray_task(prepare_vector, self.experiment, gpu=False)
        with self.reporter.stage("prepared", len(missing)) as stage:
            return collect(
                {call.remote(self.experiment, t): t.name for t in missing},
                lambda name, _: stage.advance(name),
            )

    def _finetune_missing(self, missing: Sequence[TaskConfig], stage: Stage) -> dict[str, str]:
        call = ray_task(finetune_task, self.experiment)
        pending = {call.remote(self.experiment, self._fingerprint, t): t.name for t in missing}

        def done(name: str, record: dict[str, Any]) -> None:
            note = f"{name}: loss {record['metrics']['final_loss']:.3f}"
            note += "".join(
                f", {warning}" for warning in _warnings(record["metrics"], self.experiment)
            )
            if self._stream is not None:
                self._stream.offer(name)
                floors = self._stream.status["floor"]
                note += "".join(f", M={m} error {e:.3f}" for m, e in floors.items())
            stage.advance(note)

        return collect(
            pending, done, self._stream.pump if self._stream is not None else lambda: None
        )

    def _prepare(self) -> None:
        """The pretrained model and the heads are in the store."""
        record = records.find(self.store, BASE, base_identity(self.experiment))
        if record is None:
            with self.reporter.stage("prepare", 1) as stage:
                found: dict[str, Any] = {}
                prepare = ray_task(prepare_base, self.experiment, gpu=False)
                call = prepare.remote(self.experiment, self._splits_needed)
                _fail(
                    "prepare",
                    collect({call: self.experiment.model.name}, lambda _, r: found.update(r)),
                )
                record = found
                stage.advance(f"{record['metrics']['parameters']:,} parameters")
        self._fingerprint = record["parents"]["fingerprint"]

    def _shared_mask(self) -> None:
        """Staged rounds over the summed scores of all tasks; scores and masks stay in Ray's object
        store.
        """
        experiment = self.experiment
        identity = mask_identity(experiment, experiment.tasks)
        if records.find(self.store, mask_prefix(SHARED_MASK), identity) is not None:
            return
        score = ray_array_task(score_task, experiment)
        add, select = (ray_array_task(f, experiment, gpu=False) for f in (add_scores, select_round))
        kept: Any = None
        with self.reporter.stage("mask", experiment.talos.stages) as stage:
            for round_ in range(1, experiment.talos.stages + 1):
                calls = [
                    score.remote(experiment, self._fingerprint, t, round_, kept)
                    for t in experiment.tasks
                ]
                pending = {
                    status: t.name for (status, _), t in zip(calls, experiment.tasks, strict=True)
                }
                scores = [result for _, result in calls]
                while len(scores) > 1:
                    pairs = [
                        add.remote(a, b)[1] for a, b in zip(scores[::2], scores[1::2], strict=False)
                    ]
                    scores = pairs + scores[2 * len(pairs) :]
                selected, kept = select.remote(experiment, scores[0], kept, round_)
                _fail("mask", collect(pending))
                _fail("mask", collect({selected: f"round {round_}"}))
                stage.advance(f"round {round_} of {experiment.talos.stages}")
            commit = ray_task(commit_shared_mask, experiment, gpu=False).remote(
                experiment, self._fingerprint, kept
            )
            _fail("mask", collect({commit: "writing"}))

    # Basis ----------------------------------------------------------------------------------------

    def basis(self) -> bool:
        """All vectors taken in by the actor, every basis asked for written."""
        missing = self._missing_vectors()
        if missing:
            names = ", ".join([t.name for t in missing[:3]] + ["…"] * (len(missing) > 3))
            raise UserError(
                f"{len(missing)} of {len(self.experiment.tasks)} task vectors are missing ({names}): "
                f"run `raytvb finetune` first"
            )
        if self._stream is None:
            _fail("basis", self._prepare_vectors(self.experiment.tasks))
        stream = self._stream or Stream(self.experiment)
        if self._stream is None:
            for task in self.experiment.task_names:
                stream.offer(task)
            stream.finish()
            if stream.failed:
                stream.close()
            _fail("basis", stream.failed)
        with self.reporter.stage("basis", 1) as stage:
            size, where = stream.status["cache_bytes"], {"memory": "in memory", "disk": "on disk"}
            cache = (
                f"; {format_bytes(size)} of vectors cached {where[stream.status['cache']]}"
                if size
                else ""
            )
            done = stream.write_bases()
            stage.advance(
                f"{len(basis_candidates(self.experiment))} bases, {len(done['written'])} new{cache}"
            )
        for note in done["notes"]:
            self.reporter.say(f"note: {note}")
        self._stream = None
        return bool(done["written"])

    # Search and evaluation ------------------------------------------------------------------------

    def split_refs(self, split: str) -> Refs:
        """Object references of the images of a split, made once: from the store, or decoded and
        kept there.
        """
        if split not in self._splits:
            call = ray_task(evaluation_split, self.experiment, gpu=False, results=2)
            refs = {
                t.name: call.remote(self.experiment, self._fingerprint, t, split)
                for t in self.experiment.tasks_with(split)
            }

            def read(name: str, skipped: int) -> None:
                if skipped:
                    self.reporter.say(
                        f"{name}: {skipped} images of the {split} split cannot be read and are left out"
                    )

            _fail(
                "reading images",
                collect({status: name for name, (status, _) in refs.items()}, read),
            )
            self._splits[split] = tuple((name, result) for name, (_, result) in refs.items())
        return self._splits[split]

    def _precision(self) -> str:
        """bf16 or fp32, as measured once an experiment (see `compare_precisions`)."""
        asked = self.experiment.evaluate.precision
        if asked == "fp32" or (asked == "auto" and not self.experiment.resources.gpus_per_task):
            return "fp32"
        record = records.find(self.store, PRECISION)
        if record is None or record["identity"] != {"precision": asked}:
            call = ray_task(compare_precisions_on_refs, self.experiment)
            found: dict[str, Any] = {}
            _fail(
                "comparing precisions",
                collect(
                    {
                        call.remote(
                            self.experiment, self._fingerprint, self.split_refs("val")
                        ): "bf16"
                    },
                    lambda _, r: found.update(r),
                ),
            )
            record = records.commit(
                self.store, PRECISION, identity={"precision": asked}, metrics=found
            )
            if "agreement" in found:
                self.reporter.say(
                    f"note: evaluations run in {found['use']}: bf16 keeps "
                    f"{100 * found['agreement']:.2f} % of the answers on validation images"
                )
        return str(record["metrics"]["use"])

    def _service(self, splits: Sequence[str]) -> Service:
        self._prepare()
        refs = {s: self.split_refs(s) for s in splits}
        return Service(self.experiment, self._fingerprint, refs, self._precision())

    def search(self) -> bool:
        """Coefficients of every candidate and the choice among the bases, on validation data."""
        candidates = all_candidates(self.store, self.experiment)
        measured = is_measured(self.store, self.experiment, candidates)
        if not measured:
            run_search(self._service(["val"]), candidates, self.reporter.stage)
        decision = decide(
            self.store,
            self.experiment,
            candidates,
            candidate_bytes(self.store, self.experiment, candidates),
        )
        new = commit_decision(self.store, self.experiment, candidates, decision)
        if new and decision.choice["name"] is None:
            self.reporter.say(f"note: nothing was chosen: {decision.choice['reason']}")
        elif new:
            self.reporter.say(
                f"chosen: {decision.choice['name']}; best for their size, accuracy against bytes: "
                f"{', '.join(decision.choice['front'])}"
            )
        return new or not measured

    def evaluate(self) -> bool:
        """Each result once on the test split: single models, additions, and the operations."""
        candidates = all_candidates(self.store, self.experiment)
        choice, outcomes = (
            find_choice(self.store, self.experiment, candidates),
            {c.name: find_result(self.store, self.experiment, c) for c in candidates},
        )
        missing = [n for n, o in outcomes.items() if o is None]
        if choice is None or missing:
            raise UserError(
                f"{', '.join(missing[:3]) or 'the candidates'} {'…' * (len(missing) > 3)} not searched "
                f"yet: run `raytvb search` first"
            )
        self._prepare()
        known = {n: o for n, o in outcomes.items() if o is not None}
        todo = [
            e
            for e in evaluations(
                self.experiment, candidates, known, choice, self._fingerprint, self._precision()
            )
            if not has_rows(self.store, e.name, e.identity)
        ]
        if todo:
            service = self._service(sorted({s for e in todo for s in e.splits}))
            call = ray_task(evaluate_group, self.experiment)
            groups = evaluation_groups(self.experiment, todo)
            failed: dict[str, str] = {}
            with self.reporter.stage("evaluate", len(groups)) as stage:

                def done(name: str, errors: dict[str, str]) -> None:
                    failed.update(errors)
                    stage.advance(name)

                pending = {
                    call.remote(service, group): ", ".join(e.name for e in group)
                    for group in groups
                }
                failed |= collect(pending, done)
            _fail("evaluate", failed)
        return bool(todo)


def run(
    experiment: Experiment, stages: Sequence[str] = STAGES, *, reporter: Reporter | None = None
) -> None:
    """Run stages of an experiment on the connected Ray, or that of RAY_ADDRESS, or a local one;
    resumes by itself.
    """
    connect()
    Pipeline(experiment, reporter or Reporter()).run(stages)
