"""Evaluations in Ray workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import ray

from raytvb.errors import UserError
from raytvb.evaluation.images import make_evaluator
from raytvb.evaluation.plan import Evaluation
from raytvb.evaluation.precision import compare_precisions
from raytvb.evaluation.rows import has_rows
from raytvb.experiment.config import Experiment
from raytvb.models.evaluator import Evaluator
from raytvb.models.process import worker_setup
from raytvb.orchestration.connect import slots
from raytvb.storage.store import Store

Refs = tuple[tuple[str, Any], ...]  # (task, object reference of its evaluation split)


@cache
def evaluator(experiment: Experiment, fingerprint: str, refs: Refs, precision: str) -> Evaluator:
    """The worker's evaluator, built once a process; the images stay in the node's shared memory."""
    worker_setup()
    return make_evaluator(
        experiment, fingerprint, {name: ray.get(ref) for name, ref in refs}, precision
    )


@dataclass(frozen=True)
class Service:
    """What evaluations need beside the store: the pretrained model's fingerprint, the images, and
    how to compute.
    """

    experiment: Experiment
    fingerprint: str
    splits: Mapping[str, Refs]
    precision: str

    def evaluator(self, split: str) -> Evaluator:
        """The worker's evaluator of a split."""
        return evaluator(self.experiment, self.fingerprint, self.splits[split], self.precision)


def compare_precisions_on_refs(
    experiment: Experiment, fingerprint: str, refs: Refs
) -> dict[str, Any]:
    """`compare_precisions` on images in Ray's object store."""
    worker_setup()
    return compare_precisions(experiment, fingerprint, {name: ray.get(ref) for name, ref in refs})


def evaluate_group(service: Service, group: Sequence[Evaluation]) -> dict[str, str]:
    """Evaluations one after the other with the worker's evaluators; name -> reason of those that
    failed.
    """
    failed = {}
    for each in group:
        try:
            if not has_rows(
                Store(service.experiment.store), each.name, each.identity
            ):  # it has where this is a retry
                each.function(
                    service.experiment,
                    each.name,
                    each.identity,
                    *each.arguments,
                    *(service.evaluator(s) for s in each.splits),
                )
        except (UserError, ValueError) as error:
            failed[each.name] = str(error)
    return failed


def evaluation_groups(
    experiment: Experiment, evaluations: Sequence[Evaluation]
) -> list[Sequence[Evaluation]]:
    """One a task on CPUs. A GPU task starts a process, so there two groups for each that the
    cluster holds at once.
    """
    if not experiment.resources.gpus_per_task:
        return [[e] for e in evaluations]
    count = min(len(evaluations), 2 * slots(experiment))
    return [evaluations[i::count] for i in range(count)]
