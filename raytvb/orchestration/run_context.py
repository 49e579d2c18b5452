"""What the stages of one run share: the experiment and its store, the tasks that are missing, the
pretrained model, and the decoded images of the evaluation splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from raytvb.data.image_source import SPLITS
from raytvb.errors import FailedPart, UserError
from raytvb.evaluation.evaluators import evaluation_split
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import base_identity
from raytvb.experiment.layout import BASE, PRECISION
from raytvb.experiment.metrics import BaseMetrics, PrecisionMetrics
from raytvb.experiment.missing import IMAGES, built_from, missing_parts, without
from raytvb.experiment.present_versions import PresentVersions
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.shared_masks import find_shared_mask
from raytvb.experiment.vector_states import vector_states
from raytvb.models.pretrained_files import activation_warnings
from raytvb.models.pretrained_model import store_base
from raytvb.orchestration.evaluation_service import Refs, Service, compare_precisions_on_refs
from raytvb.orchestration.failures import Failure, stage_error
from raytvb.orchestration.progress import Reporter
from raytvb.orchestration.ray_tasks import collect, ray_task, result_of
from raytvb.orchestration.stream import Stream
from raytvb.orchestration.task_failures import TaskFailures
from raytvb.storage import records
from raytvb.storage.records import Record
from raytvb.storage.store import Store


class ImagesMissingError(UserError):
    """Images of some tasks cannot be read. The tasks have been left out, so that stages that need
    the images can run again without them."""


class RunContext:
    """The state of one run on one connected Ray cluster.

    It holds keys, small records and references to objects in Ray's store, but never a vector.
    """

    def __init__(
        self, experiment: Experiment, reporter: Reporter, *, renews_mask: bool = False
    ) -> None:
        """renews_mask: whether the stage `finetune` makes the shared mask anew."""
        experiment.resources.apply_to_storage()
        self.store, self.reporter = Store(experiment.store), reporter
        # Workers have other working folders, where a relative path would mean another place.
        places = {"store": self.store.url}
        if experiment.vectors is not None:
            places["vectors"] = Store(experiment.vectors).url
        self.whole = experiment.model_copy(update=places)
        """The experiment with all of its tasks."""
        self.experiment = self.whole
        """The experiment without the tasks that `leave_out_missing` has left out."""
        self.splits: tuple[str, ...] = SPLITS
        """The splits that the stages of this run read."""
        self.measured_splits: tuple[str, ...] = ()
        """Those of them that the search and the evaluations read."""
        self.stream: Stream | None = None
        """Sends committed vectors to the basis actor; set while fine-tuning feeds it."""
        self.renews_mask = renews_mask
        self._refs: dict[tuple[str, str], Any] = {}

    @cached_property
    def failures(self) -> TaskFailures:
        """The tasks that failed, in this run or before it."""
        return TaskFailures(self.store, self.whole, self.reporter.say)

    def missing_parts(self) -> list[FailedPart]:
        """The tasks that are missing, with the reasons."""
        return missing_parts(self.store, self.whole, self.failures.parts)

    def leave_out_missing(self) -> None:
        """Restrict `experiment` to the tasks that are there, and say which are not."""
        parts = self.missing_parts()
        before, self.experiment = self.experiment, without(self.whole, parts)
        if not parts or self.experiment == before:
            return
        self.reporter.say(f"note: {built_from(self.whole, parts)}")
        sizes = set(self.whole.search.sizes) - set(self.experiment.search.sizes)
        if sizes:
            names = ", ".join(map(str, sorted(sizes)))
            self.reporter.say(f"note: no basis of size {names}: there are too few vectors")

    @property
    def has_too_few(self) -> bool:
        """Whether so many tasks are missing that there is nothing to combine: fewer than two are
        left."""
        return len(self.experiment.tasks) < min(2, len(self.whole.tasks))

    @cached_property
    def fingerprint(self) -> str:
        """Checksum of the pretrained weights. First puts the model into the store."""
        record = records.find(self.store, BASE, base_identity(self.whole))
        if record is None:
            record = self._store_base()
        return record.parent("fingerprint", self.store.where(BASE))

    def _store_base(self) -> Record:
        with self.reporter.stage("prepare", 1) as stage:
            call = ray_task(store_base, self.whole, gpu=False).remote(self.whole)
            record: Record = result_of(self.whole, call, "prepare", self.whole.model.name)
            metrics = record.metrics_as(BaseMetrics, self.store.where(BASE))
            stage.advance(f"{metrics.parameters:,} parameters")
        if self.whole.model.pretrained is not None:
            look = ray_task(activation_warnings, self.whole, gpu=False).remote(self.whole.model)
            for line in result_of(self.whole, look, "prepare", self.whole.model.name):
                self.reporter.say(f"warning: {line}")
        return record

    def vector_records(self) -> dict[str, Record]:
        """The records of the vectors of the whole experiment that are as it asks for, by task.

        Raises UserError if the shared mask, or a vector of another store, has other settings.
        """
        mask = find_shared_mask(self.store, self.whole) if self.whole.shares_mask else None
        committed = {}
        for name, state in vector_states(self.whole, mask).items():
            if state.vector is not None and state.is_current:
                committed[name] = state.vector.record
        return committed

    def split_refs(self, split: str) -> Refs:
        """References to the images of a split of every task, in Ray's object store.

        A run loads a split once. Images come from the store of the experiment, or are decoded and
        then kept in that store. Raises ImagesMissingError if images of a task cannot be read.
        """
        tasks = self.experiment.tasks_with(split)
        failed = self._load(split, tasks)
        if failed:
            self.failures.add(IMAGES, failed)
            raise ImagesMissingError(str(stage_error("reading images", failed)))
        return tuple((task.name, self._refs[split, task.name]) for task in tasks)

    def retry_images(self) -> None:
        """Try to read the images of those tasks that an earlier run could not read."""
        names = self.failures.at(IMAGES)
        failed: dict[str, Failure] = {}
        for split in SPLITS[1:] if names else ():
            tasks = [task for task in self.whole.tasks_with(split) if task.name in names]
            failed |= self._load(split, tasks)
        self.failures.clear(set(names) - failed.keys(), IMAGES)
        self.failures.add(IMAGES, failed)

    def _load(self, split: str, tasks: Sequence[TaskConfig]) -> dict[str, Failure]:
        """Load the images of a split that this run has not loaded. Returns the failures by task."""
        task_of = ray_task(evaluation_split, self.whole, gpu=False, results=2)
        pending, images = dict[Any, str](), dict[str, Any]()
        for task in tasks:
            if (split, task.name) not in self._refs:
                skipped, arrays = task_of.remote(self.whole, self.fingerprint, task, split)
                pending[skipped] = task.name
                images[task.name] = arrays

        def tell_skipped(name: str, skipped: int) -> None:
            self._refs[split, name] = images[name]
            # Otherwise the check of the data has said so, with the reasons.
            if skipped and self.whole.data.leaks == "ignore":
                self.reporter.say(
                    f"{name}: {skipped} images of the {split} split cannot be read and are left out"
                )

        return collect(self.whole, pending, tell_skipped)

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
        metrics = result_of(self.experiment, call, "comparing precisions", "bf16")
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

    def service(self, splits: Sequence[str], present: PresentVersions) -> Service:
        """What evaluations in workers need: model, images and precision."""
        refs = {}
        for split in splits:
            refs[split] = self.split_refs(split)
        return Service(self.experiment, self.fingerprint, refs, self.precision(), present)
