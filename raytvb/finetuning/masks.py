"""Masks of tasks: scored in rounds, selected, committed.

A mask is made from scores, one for each parameter; the parameters with the lowest scores are kept
(see `maths.fisher` and `maths.mask_selection`). `own_mask` makes a task's own mask in one call. For
the shared mask, the scores of all tasks are added up across workers. So each step of it is a
function of arrays: `score_task`, `add_scores`, `select_round`, `commit_shared_mask`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from raytvb.data.load_split import load_split
from raytvb.data.preprocess import Preprocess
from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import mask_identity, own_mask_settings
from raytvb.experiment.layout import MASK, OVERLAP, SHARED_MASK, mask_prefix
from raytvb.experiment.metrics import MaskMetrics, OverlapMetrics
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.stored_vectors import StoredVector, vectors_of
from raytvb.experiment.task_store import TaskStore
from raytvb.maths.finite import listed
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
from raytvb.models.classifier import ImageClassifier
from raytvb.models.open_clip_models import Encoder
from raytvb.models.pretrained_model import load_base
from raytvb.models.pretrained_task import PretrainedTask
from raytvb.models.worker_process import device, threads, worker_setup
from raytvb.storage import records
from raytvb.storage.masks import Mask, MaskFile, mask_intersections
from raytvb.storage.replacing import commit_over, new_tag, tagged
from raytvb.storage.store import Store

# Masks in the store -------------------------------------------------------------------------------


def load_mask(store: Store, key: str) -> Mask:
    """The whole mask in a file. Raises VectorError if the file is damaged."""
    return MaskFile(store, key).load()


def _write_own_mask(task_store: TaskStore, mask: Mask) -> str:
    """Commit a task's own mask, and return the key of its file.

    The record still lists the files of a mask before it, as long as the task's vector needs it.
    """
    store, prefix = task_store.store, task_store.own_mask_prefix
    before, data = records.find(store, prefix), mask.to_bytes()
    name = tagged(MASK, new_tag(store, prefix, data))
    records.commit(
        store,
        prefix,
        identity=task_store.mask_identity,
        metrics=MaskMetrics(kept=mask.kept, total=len(mask.bits), file=name),
        written=None if before is None else before.files,
        files={name: data},
        parents={"mask": mask.fingerprint},
    )
    return records.file_key(prefix, name)


def drop_old_masks(task_store: TaskStore) -> None:
    """Delete the masks that a task had before its present one, after its vector was committed."""
    store, prefix = task_store.store, task_store.own_mask_prefix
    record = records.find(store, prefix) if task_store.experiment.own_masks else None
    if record is None or len(record.files) < 2:
        return
    metrics = record.metrics_as(MaskMetrics, store.where(prefix))
    commit_over(
        store,
        prefix,
        identity=record.identity,
        metrics=metrics,
        written={metrics.file: record.file(metrics.file, store.where(prefix))},
        parents=record.parents,
    )


def record_overlap(experiment: Experiment) -> None:
    """Measure and store how far the tasks' own masks overlap, unless that is stored already.

    The file has the sizes of the intersections of all pairs of masks, (T, T) int64. The record has
    mean, minimum and maximum of the pairs' Jaccard indices.
    """
    worker_setup()
    store = Store(experiment.store)
    vectors = vectors_of(experiment, experiment.task_names)
    if has_overlap(experiment, vectors):
        return
    masks = []
    for task in experiment.task_names:
        file = vectors[task].open()
        masks.append(MaskFile(file.store, file.mask_key))
    intersections = mask_intersections(masks)
    pairs = jaccard(intersections)[tuple(torch.triu_indices(len(masks), len(masks), 1))]
    records.commit(
        store,
        OVERLAP,
        identity=mask_identity(experiment, experiment.tasks),
        parents=_mask_parents(vectors),
        metrics=OverlapMetrics(
            mean=float(pairs.mean()), min=float(pairs.min()), max=float(pairs.max())
        ),
        files={"overlap.safetensors": save({"intersections": intersections})},
    )


def has_overlap(experiment: Experiment, vectors: Mapping[str, StoredVector]) -> bool:
    """Whether the store has the overlap of the masks that these vectors were trained on."""
    record = records.find(Store(experiment.store), OVERLAP)
    if record is None:
        return False
    if record.parents:
        return record.parents == _mask_parents(vectors)
    identity = mask_identity(experiment, experiment.tasks)  # of an earlier format
    return own_mask_settings(record.identity) == own_mask_settings(identity)


def _mask_parents(vectors: Mapping[str, StoredVector]) -> dict[str, str]:
    return {mask_prefix(task): str(vector.mask) for task, vector in vectors.items()}


# Scores -------------------------------------------------------------------------------------------


def score_task(
    experiment: Experiment, fingerprint: str, task: TaskConfig, round_: int, kept: np.ndarray | None
) -> np.ndarray:
    """Scores (D,) float32 of one task in one round. The lowest scores are to be kept.

    round_: counts from 1. kept: (D,) bool, the entries that the round before kept; None in the
    first round.
    """
    worker_setup()
    task_store = TaskStore(experiment, task)
    return _scores(task_store, PretrainedTask.load(task_store, fingerprint), round_, kept)


def _scores(
    task_store: TaskStore, pretrained: PretrainedTask, round_: int, kept: np.ndarray | None
) -> np.ndarray:
    """As `score_task`, by the way of selection in the experiment's `talos.select`."""
    experiment, task = task_store.experiment, task_store.task
    classifier = pretrained.classifier()
    parameters = {n: p.detach() for n, p in classifier.named_parameters()}
    seed = task_seed(experiment.seed, f"{task.name}/scores/{round_}")
    generator = torch.Generator().manual_seed(seed)
    select = experiment.talos.select
    if select == "magnitude":
        return -flatten(parameters).abs().numpy()
    if select == "random":
        return torch.rand(len(flatten(parameters)), generator=generator).numpy()
    if kept is not None:
        mask = unflatten(torch.from_numpy(kept.copy()), parameters)
        damped = damp(parameters, mask, experiment.talos.damping)
        classifier.load_state_dict(damped, strict=False)
    scores = _sensitivities(task_store, classifier, pretrained.preprocess, generator)
    return (-scores if select == "highest" else scores).cpu().numpy()


def _sensitivities(
    task_store: TaskStore,
    classifier: ImageClassifier,
    preprocess: Preprocess,
    generator: torch.Generator,
) -> Tensor:
    """Fisher scores (D,) float32 on the worker's device, over a sample of training images.

    Raises UserError for logits that are not finite, and UserError that names the parameters whose
    scores are NaN. A score that overflowed to infinity is the highest one.
    """
    experiment = task_store.experiment
    split = load_split(
        task_store.task,
        "train",
        preprocess,
        threads=threads(experiment),
        sample=experiment.talos.images,
        generator=generator,
        reading=experiment.data,
    )
    place = device()
    try:
        scores = fisher_scores(
            classifier.to(place),
            preprocess.normalise(split.images.to(place)),
            draws=experiment.talos.draws,
            generator=generator,
            precision=experiment.talos.precision,
        )
    except ValueError as error:
        raise _cannot_score(task_store, str(error)) from error
    bad = [name for name, score in sorted(scores.items()) if bool(score.isnan().any())]
    if bad:
        raise _cannot_score(task_store, f"the scores are NaN in {listed(bad)}")
    return flatten(scores)


def _cannot_score(task_store: TaskStore, problem: str) -> UserError:
    return UserError(
        f"task {task_store.task.name}: the sensitivity of the parameters cannot be measured: "
        f"{problem}; check the weights of the pretrained model, or use talos.precision: fp32"
    )


def add_scores(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Sum of two score vectors (D,).

    The caller adds up all tasks in a tree that depends only on the order of the tasks.
    """
    total: np.ndarray = left + right
    return total


def select_round(
    experiment: Experiment, scores: np.ndarray, kept: np.ndarray | None, round_: int
) -> np.ndarray:
    """The entries (D,) bool that are kept after a round.

    scores and kept: as in `score_task`, of this round. round_: counts from 1.
    """
    density = round_density(experiment.talos.density, round_, experiment.talos.stages)
    before = None if kept is None else {"": torch.from_numpy(kept.copy())}
    return select_further({"": torch.from_numpy(scores.copy())}, before, density)[""].numpy()


# Whole masks --------------------------------------------------------------------------------------


def commit_shared_mask(
    experiment: Experiment, fingerprint: str, kept: np.ndarray, mask_id: str = SHARED_MASK
) -> MaskMetrics:
    """Store the shared mask of the kept entries (D,) bool, scored on the experiment's tasks."""
    mask = _mask_of(load_base(experiment.store, fingerprint), kept)
    metrics = MaskMetrics(kept=mask.kept, total=len(mask.bits))
    records.commit(
        Store(experiment.store),
        mask_prefix(mask_id),
        identity=mask_identity(experiment, experiment.tasks),
        metrics=metrics,
        files={MASK: mask.to_bytes()},
        parents={"mask": mask.fingerprint},
    )
    return metrics


def _mask_of(encoder: Encoder, kept: np.ndarray) -> Mask:
    return Mask.of(unflatten(torch.from_numpy(kept.copy()), encoder.visual_state()))


def own_mask(task_store: TaskStore, pretrained: PretrainedTask) -> tuple[Mask, str]:
    """A task's own mask and the key of its file. If there is none, it is made and committed."""
    store, prefix = task_store.store, task_store.own_mask_prefix
    record = records.find(store, prefix)
    wanted = own_mask_settings(task_store.mask_identity)
    if record is not None and own_mask_settings(record.identity) == wanted:
        metrics = record.metrics_as(MaskMetrics, store.where(prefix))
        key = records.file_key(prefix, metrics.file)
        return load_mask(store, key), key
    mask = made_mask(task_store, pretrained)
    return mask, _write_own_mask(task_store, mask)


def made_mask(task_store: TaskStore, pretrained: PretrainedTask) -> Mask:
    """The mask of the task's own scores, made in rounds. Nothing is stored."""
    experiment, kept = task_store.experiment, None
    for round_ in range(1, experiment.talos.stages + 1):
        scores = _scores(task_store, pretrained, round_, kept)
        kept = select_round(experiment, scores, kept, round_)
    assert kept is not None
    return _mask_of(pretrained.encoder, kept)
