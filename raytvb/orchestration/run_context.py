"""What the stages of one run share: the experiment and its store, the pretrained model, and the
decoded images of the evaluation splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from raytvb.data.image_source import SPLITS
from raytvb.evaluation.evaluators import evaluation_split
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import base_identity, vector_identity
from raytvb.experiment.layout import BASE, PRECISION, vector_prefix
from raytvb.experiment.metrics import BaseMetrics, PrecisionMetrics
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.models.pretrained_model import store_base
from raytvb.orchestration.evaluation_service import Refs, Service, compare_precisions_on_refs
from raytvb.orchestration.progress import Reporter
from raytvb.orchestration.ray_tasks import collect, raise_failed, ray_task, result_of
from raytvb.orchestration.stream import Stream
from raytvb.storage import records
from raytvb.storage.records import Record
from raytvb.storage.store import Store


class RunContext:
    """The state of one run on one connected Ray cluster.

    It holds keys, small records and references to objects in Ray's store, but never a vector.
    """

    def __init__(self, experiment: Experiment, reporter: Reporter) -> None:
        self.store, self.reporter = Store(experiment.store), reporter
        # Workers have other working folders, where a relative path would mean another place.
        self.experiment = experiment.model_copy(update={"store": self.store.url})
        self.splits: tuple[str, ...] = SPLITS
        """The splits whose images the stages of this run read."""
        self.stream: Stream | None = None
        """Sends committed vectors to the basis actor; set while fine-tuning feeds it."""
        self._split_refs: dict[str, Refs] = {}

    @cached_property
    def fingerprint(self) -> str:
        """Checksum of the pretrained weights. First puts the model and the heads into the store."""
        record = records.find(self.store, BASE, base_identity(self.experiment))
        if record is None:
            record = self._store_base()
        return record.parent("fingerprint", self.store.where(BASE))

    def _store_base(self) -> Record:
        with self.reporter.stage("prepare", 1) as stage:
            task = ray_task(store_base, self.experiment, gpu=False)
            call = task.remote(self.experiment, self.splits)
            record: Record = result_of(call, "prepare", self.experiment.model.name)
            metrics = record.metrics_as(BaseMetrics, self.store.where(BASE))
            stage.advance(f"{metrics.parameters:,} parameters")
        return record

    def missing_vectors(self) -> list[TaskConfig]:
        """The tasks that have no committed vector."""
        missing = []
        for task in self.experiment.tasks:
            identity = vector_identity(self.experiment, task)
            if records.find(self.store, vector_prefix(task.name), identity) is None:
                missing.append(task)
        return missing

    def split_refs(self, split: str) -> Refs:
        """References to the images of a split of every task, in Ray's object store.

        A run loads a split once. Images come from the store of the experiment, or are decoded and
        then kept in that store.
        """
        if split not in self._split_refs:
            self._split_refs[split] = self._load_split(split)
        return self._split_refs[split]

    def _load_split(self, split: str) -> Refs:
        task_of = ray_task(evaluation_split, self.experiment, gpu=False, results=2)
        pending, images = dict[Any, str](), list[tuple[str, Any]]()
        for task in self.experiment.tasks_with(split):
            skipped, arrays = task_of.remote(self.experiment, self.fingerprint, task, split)
            pending[skipped] = task.name
            images.append((task.name, arrays))

        def tell_skipped(name: str, skipped: int) -> None:
            if skipped:
                self.reporter.say(
                    f"{name}: {skipped} images of the {split} split cannot be read and are left out"
                )

        raise_failed("reading images", collect(pending, tell_skipped))
        return tuple(images)

    def precision(self) -> str:
        """The number format that evaluations compute in, bf16 or fp32.

        If the experiment leaves the choice open, it is measured once (see `compare_precisions`).
        """
        setting = self.experiment.evaluate.precision
        on_cpu = not self.experiment.resources.gpus_per_task
        if setting == "fp32" or (setting == "auto" and on_cpu):
            return "fp32"
        record = records.find(self.store, PRECISION)
        if record is None or record.identity != {"precision": setting}:
            record = self._compare_precisions(setting)
        return record.metrics_as(PrecisionMetrics, self.store.where(PRECISION)).use

    def _compare_precisions(self, setting: str) -> Record:
        task = ray_task(compare_precisions_on_refs, self.experiment)
        call = task.remote(self.experiment, self.fingerprint, self.split_refs("val"))
        metrics = result_of(call, "comparing precisions", "bf16")
        record = records.commit(
            self.store, PRECISION, identity={"precision": setting}, metrics=metrics
        )
        measured = record.metrics_as(PrecisionMetrics, self.store.where(PRECISION))
        if measured.agreement is not None:
            self.reporter.say(
                f"note: evaluations run in {measured.use}: bf16 keeps "
                f"{100 * measured.agreement:.2f} % of the answers on validation images"
            )
        return record

    def service(self, splits: Sequence[str]) -> Service:
        """What evaluations in workers need: model, images and precision."""
        refs = {}
        for split in splits:
            refs[split] = self.split_refs(split)
        return Service(self.experiment, self.fingerprint, refs, self.precision())
