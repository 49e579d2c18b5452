"""Masks of tasks: scored in rounds, selected, committed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from raytvb.data.loading import load_split
from raytvb.data.preprocess import Preprocess
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import mask_identity
from raytvb.experiment.layout import OVERLAP, SHARED_MASK, mask_prefix
from raytvb.experiment.tasks import TaskConfig
from raytvb.maths.fisher import fisher_scores
from raytvb.maths.mask_selection import (
    damp,
    flatten,
    jaccard,
    round_density,
    select_further,
    unflatten,
)
from raytvb.maths.seeds import task_seed
from raytvb.models.base import base_encoder
from raytvb.models.classifier import ImageClassifier
from raytvb.models.heads import load_head
from raytvb.models.process import device, threads, worker_setup
from raytvb.storage import records
from raytvb.storage.masks import Mask, MaskFile, mask_intersections
from raytvb.storage.store import Store


def load_mask(store: Store, mask_id: str) -> Mask:
    """A stored mask, whole."""
    return MaskFile(store, f"{mask_prefix(mask_id)}/mask.safetensors").load()


def write_mask(
    store: Store, experiment: Experiment, mask_id: str, tasks: Sequence[TaskConfig], mask: Mask
) -> None:
    """Commit a mask and its record."""
    metrics = {"kept": mask.kept, "total": len(mask.bits)}
    records.commit(
        store,
        mask_prefix(mask_id),
        identity=mask_identity(experiment, tasks),
        metrics=metrics,
        files={"mask.safetensors": mask.to_bytes()},
        parents={"mask": mask.fingerprint},
    )


def write_overlap(store: Store, experiment: Experiment) -> dict[str, Any]:
    """Commit how far the tasks' own masks overlap: intersections (T, T) int64; mean, min and max
    Jaccard index.
    """
    masks = [MaskFile(store, f"{mask_prefix(t)}/mask.safetensors") for t in experiment.task_names]
    intersections = mask_intersections(masks)
    pairs = jaccard(intersections)[tuple(torch.triu_indices(len(masks), len(masks), 1))]
    metrics = {"mean": float(pairs.mean()), "min": float(pairs.min()), "max": float(pairs.max())}
    return records.commit(
        store,
        OVERLAP,
        identity=mask_identity(experiment, experiment.tasks),
        metrics=metrics,
        files={"overlap.safetensors": save({"intersections": intersections})},
    )


def fresh_classifier(
    experiment: Experiment, fingerprint: str, task: TaskConfig
) -> tuple[ImageClassifier, Preprocess]:
    """A fresh copy of the pretrained tower with the task's head."""
    encoder = base_encoder(experiment.store, fingerprint)
    head = load_head(Store(experiment.store), experiment, task, encoder)
    model: Any = encoder.model
    return ImageClassifier(copy.deepcopy(model.visual), head).eval(), encoder.preprocess


def score_task(
    experiment: Experiment, fingerprint: str, task: TaskConfig, round_: int, kept: np.ndarray | None
) -> np.ndarray:
    """Scores (D,) float32 of one task in one round, the lowest to be kept; `kept` (D,) bool are
    still in the race.
    """
    worker_setup()
    classifier, preprocess = fresh_classifier(experiment, fingerprint, task)
    parameters = {n: p.detach() for n, p in classifier.named_parameters()}
    seed = task_seed(experiment.seed, f"{task.name}/scores/{round_}")
    generator = torch.Generator().manual_seed(seed)
    if experiment.talos.select == "magnitude":
        return -flatten(parameters).abs().numpy()
    if experiment.talos.select == "random":
        return torch.rand(len(flatten(parameters)), generator=generator).numpy()
    if kept is not None:
        damped = damp(
            parameters,
            unflatten(torch.from_numpy(kept.copy()), parameters),
            experiment.talos.damping,
        )
        classifier.load_state_dict(damped, strict=False)
    split = load_split(
        task,
        "train",
        preprocess,
        threads=threads(experiment),
        sample=experiment.talos.images,
        generator=generator,
    )
    place = device()
    images = preprocess.normalise(split.images.to(place))
    scores = flatten(
        fisher_scores(
            classifier.to(place),
            images,
            draws=experiment.talos.draws,
            generator=generator,
            precision=experiment.talos.precision,
        )
    )
    return (-scores if experiment.talos.select == "highest" else scores).cpu().numpy()


def add_scores(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Sum of two score vectors; the tree in which they are added is fixed by the order of the
    tasks.
    """
    return left + right


def select_round(
    experiment: Experiment, scores: np.ndarray, kept: np.ndarray | None, round_: int
) -> np.ndarray:
    """The entries (D,) bool that are kept after round `round_` (1-based)."""
    density = round_density(experiment.talos.density, round_, experiment.talos.stages)
    before = None if kept is None else {"": torch.from_numpy(kept.copy())}
    return select_further({"": torch.from_numpy(scores.copy())}, before, density)[""].numpy()


def commit_shared_mask(
    experiment: Experiment, fingerprint: str, kept: np.ndarray
) -> dict[str, int]:
    """Store the shared mask; returns its numbers of kept and of all entries."""
    state = base_encoder(experiment.store, fingerprint).visual_state()
    mask = Mask.of(unflatten(torch.from_numpy(kept.copy()), state))
    write_mask(Store(experiment.store), experiment, SHARED_MASK, experiment.tasks, mask)
    return {"kept": mask.kept, "total": len(mask.bits)}


def own_mask(experiment: Experiment, fingerprint: str, task: TaskConfig) -> Mask:
    """A task's own mask: taken from the store, or made in staged rounds and committed."""
    store, mask_id = Store(experiment.store), task.name
    if records.find(store, mask_prefix(mask_id), mask_identity(experiment, [task])):
        return load_mask(store, mask_id)
    kept: np.ndarray | None = None
    for round_ in range(1, experiment.talos.stages + 1):
        kept = select_round(
            experiment, score_task(experiment, fingerprint, task, round_, kept), kept, round_
        )
    assert kept is not None
    state = base_encoder(experiment.store, fingerprint).visual_state()
    mask = Mask.of(unflatten(torch.from_numpy(kept), state))
    write_mask(store, experiment, mask_id, [task], mask)
    return mask


def record_overlap(experiment: Experiment) -> None:
    """Store how far the tasks' own masks overlap, unless that is stored."""
    worker_setup()
    store = Store(experiment.store)
    if records.find(store, OVERLAP, mask_identity(experiment, experiment.tasks)) is None:
        write_overlap(store, experiment)
