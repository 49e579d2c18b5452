"""Measures whether evaluations may run in bf16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytvb.evaluation.evaluators import SplitArrays, make_evaluator
from raytvb.experiment.config import Experiment
from raytvb.experiment.metrics import PrecisionMetrics
from raytvb.experiment.stored_vectors import vector_set, vectors_of
from raytvb.models.evaluator import Evaluator
from raytvb.models.worker_process import device

KEPT_ANSWERS = 0.995
"""The share of the answers of fp32 that bf16 must keep."""


def compare_precisions(
    experiment: Experiment, fingerprint: str, arrays: Mapping[str, SplitArrays]
) -> PrecisionMetrics:
    """Measure whether evaluations may compute in bf16: it must keep KEPT_ANSWERS of fp32's answers.

    The answers of two models are compared on validation images: those of the pretrained model, and
    those of the model with the mean task vector added. The model with the lower share of equal
    answers counts. Most CPUs are slower in bf16, so bf16 is tried on a CPU only with
    `precision: bf16`.

    arrays: validation images, by task.
    """
    place = device()
    setting = experiment.evaluate.precision
    if setting == "fp32" or (setting == "auto" and place.type == "cpu"):
        return PrecisionMetrics(use="fp32", device=place.type)
    exact = make_evaluator(experiment, fingerprint, arrays, "fp32")
    rough = make_evaluator(experiment, fingerprint, arrays, "bf16")
    count, vectors = len(experiment.tasks), vectors_of(experiment, experiment.task_names)
    mean_vector = next(
        vector_set([vectors[task] for task in experiment.task_names]).combinations(
            torch.full((count, 1), 1.0 / count, dtype=torch.float64)
        )
    )
    models = [
        _equal_answers(exact, rough, direction, list(arrays)) for direction in (None, mean_vector)
    ]
    agreement = min(model.share for model in models)
    return PrecisionMetrics(
        use="bf16" if agreement >= KEPT_ANSWERS else "fp32",
        device=place.type,
        agreement=agreement,
        worst_task=min(model.worst_task for model in models),
        images=models[0].images,
    )


@dataclass(frozen=True)
class _EqualAnswers:
    """How often two precisions give the same answer for one model."""

    share: float
    """Share of all images with equal answers, 0 to 1."""
    worst_task: float
    """The same share for the task with the lowest one."""
    images: int


def _equal_answers(
    exact: Evaluator, rough: Evaluator, direction: Tensor | None, tasks: Sequence[str]
) -> _EqualAnswers:
    """Compare two evaluators on the pretrained model with a direction added."""
    exact.merge(direction, 1.0)
    rough.merge(direction, 1.0)
    equal, images, worst = 0, 0, 1.0
    for task in tasks:
        answers = exact.answers(task)[0]
        equal_here = int((answers == rough.answers(task)[0]).sum())
        equal += equal_here
        images += len(answers)
        worst = min(worst, equal_here / len(answers))
    return _EqualAnswers(equal / images, worst, images)
