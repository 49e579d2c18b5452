"""Whether evaluations may run in bf16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from raytvb.evaluation.images import make_evaluator
from raytvb.experiment.config import Experiment
from raytvb.experiment.stored import vector_set
from raytvb.models.process import device

KEPT_ANSWERS = 0.995  # share of them that bf16 must not change


def compare_precisions(
    experiment: Experiment, fingerprint: str, arrays: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Whether bf16 may be used: on validation images, it must keep KEPT_ANSWERS of the answers of
    float32.

    Of the pretrained model, and of that with the mean task vector added. Returns `use`, the
    `agreement` on all images (of the worse model), that of the worst task, the number of images,
    and the device. On a CPU only `precision: bf16` asks for it, as most compute it slower.
    """
    place = device()
    if experiment.evaluate.precision == "fp32" or (
        experiment.evaluate.precision == "auto" and place.type == "cpu"
    ):
        return {"use": "fp32", "device": place.type}
    evaluators = {p: make_evaluator(experiment, fingerprint, arrays, p) for p in ("fp32", "bf16")}
    count = len(experiment.tasks)
    mean_vector = next(
        vector_set(experiment.store, experiment.task_names).combinations(
            torch.full((count, 1), 1.0 / count, dtype=torch.float64)
        )
    )
    agreements, worst, images = [], 1.0, 0
    for direction in (None, mean_vector):
        same, total = 0, 0
        for evaluator in evaluators.values():
            evaluator.merge(direction, 1.0)
        for task in arrays:
            left, right = (e.answers(task)[0] for e in evaluators.values())
            agree = int((left == right).sum())
            same, total, worst = same + agree, total + len(left), min(worst, agree / len(left))
        agreements.append(same / total)
        images = total
    agreement = min(agreements)
    return {
        "use": "bf16" if agreement >= KEPT_ANSWERS else "fp32",
        "agreement": agreement,
        "worst_task": worst,
        "images": images,
        "device": place.type,
    }
