"""What Ray workers need to run evaluations, and the tasks that run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import ray

from raytvb.errors import UserError
from raytvb.evaluation.evaluation import Context, Evaluation
from raytvb.evaluation.evaluators import SplitArrays, make_evaluator
from raytvb.evaluation.precision import compare_precisions
from raytvb.experiment.config import Experiment
from raytvb.experiment.metrics import PrecisionMetrics
from raytvb.experiment.present_versions import PresentVersions
from raytvb.models.evaluator import Evaluator
from raytvb.models.worker_process import worker_setup
from raytvb.orchestration.connect import slots
from raytvb.storage.store_errors import StoreError

Refs = tuple[tuple[str, Any], ...]
"""Pairs of a task and the object reference of its `SplitArrays`."""


def _fetched(refs: Refs) -> dict[str, SplitArrays]:
    """The images of each task, by its name. The arrays lie in the node's shared memory."""
    arrays: dict[str, SplitArrays] = {}
    for task, ref in refs:
        fetched: Any = ray.get(ref)
        arrays[task] = fetched
    return arrays


@cache
def evaluator(experiment: Experiment, fingerprint: str, refs: Refs, precision: str) -> Evaluator:
    """The evaluator of a worker. Each process builds it once."""
    worker_setup()
    return make_evaluator(experiment, fingerprint, _fetched(refs), precision)


@dataclass(frozen=True)
class Service:
    """What a worker needs to evaluate, in addition to the store."""

    experiment: Experiment
    fingerprint: str
    """Checksum of the pretrained model."""
    splits: Mapping[str, Refs]
    """References to the images, by split."""
    precision: str
    present: PresentVersions
    """The versions that are measured."""

    def evaluator(self, split: str) -> Evaluator:
        """The worker's evaluator of a split."""
        return evaluator(self.experiment, self.fingerprint, self.splits[split], self.precision)

    @property
    def context(self) -> Context:
        """The context that evaluations run in."""
        return Context(self.experiment, self.fingerprint, self.evaluator, self.present)


def compare_precisions_on_refs(
    experiment: Experiment, fingerprint: str, refs: Refs
) -> PrecisionMetrics:
    """`compare_precisions` on images in Ray's object store."""
    worker_setup()
    return compare_precisions(experiment, fingerprint, _fetched(refs))


def evaluate_group(service: Service, group: Sequence[Evaluation]) -> dict[str, str]:
    """Run evaluations one after the other. Returns the reason of each that failed, by its name."""
    context = service.context
    failed: dict[str, str] = {}
    for evaluation in group:
        try:
            # If Ray repeats this task, the store already has the first evaluations of the group.
            if not evaluation.is_done(context.store, context.present):
                evaluation.run(context)
        except (UserError, ValueError) as error:
            failed[evaluation.name] = str(error)
        except StoreError:
            # Files that are gone: has another run replaced what is measured?
            try:
                service.present.check_present(service.experiment)
            except UserError as replaced:
                failed[evaluation.name] = str(replaced)
                continue
            raise
    return failed


def evaluation_groups(
    experiment: Experiment, evaluations: Sequence[Evaluation]
) -> list[Sequence[Evaluation]]:
    """The evaluations in groups; one Ray task runs one group.

    A CPU task gets a single evaluation, so that all workers end at about the same time. Every GPU
    task starts a process of its own, so there are only twice as many groups as the cluster can run
    at once.
    """
    if not experiment.resources.gpus_per_task:
        return [[evaluation] for evaluation in evaluations]
    count = min(len(evaluations), 2 * slots(experiment))
    return [evaluations[first::count] for first in range(count)]
