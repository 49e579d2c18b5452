"""What runs in Ray workers, as plain functions of small arguments; `pipeline` wraps them with Ray in one place.

Every function that makes a thing first looks for its record, so a retried or resumed call does nothing twice.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytvb import artifacts, records
from raytvb.block_cache import damaged
from raytvb.config import Experiment, TaskConfig
from raytvb.data import SPLITS, Split, check_task, load_split
from raytvb.directions import prepared
from raytvb.encoder import ImageClassifier, Preprocess, quiet_open_clip
from raytvb.errors import UserError
from raytvb.evaluate import Evaluator
from raytvb.finetune import finetune, task_seed
from raytvb.fisher import fisher_scores
from raytvb.masks import Mask
from raytvb.split_cache import cached_split
from raytvb.store import Store
from raytvb.talos import damp, flatten, round_density, select_further, unflatten
from raytvb.vectors import vector_bytes, vector_info

KEPT_ANSWERS = 0.995  # share of them that bf16 must not change


def worker_setup() -> None:
    """Once a worker process: one thread (results do not depend on what a task asks for), no model-loading chatter."""
    quiet_open_clip()
    torch.set_num_threads(1)


def device() -> torch.device:
    """The GPU that Ray gave this worker, or the CPU, also where the GPUs Ray counts are not there."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return torch.device("cuda" if given and torch.cuda.is_available() else "cpu")


def threads(experiment: Experiment) -> int:
    """Threads that decode images; how many changes no result."""
    return max(1, int(experiment.resources.cpus_per_task))


def prepare_base(experiment: Experiment, splits: Sequence[str] = SPLITS) -> dict[str, Any]:
    """Store the pretrained model and the heads, if every task has the splits; returns its record."""
    worker_setup()
    store = Store(experiment.store)
    record = records.find(store, artifacts.BASE, artifacts.base_identity(experiment))
    if record is not None:
        return record
    classes = {t.name: check_task(t, [s for s in splits if t in experiment.tasks_with(s)])
               for t in experiment.every_task}
    return artifacts.write_base(store, experiment, classes)


def _classifier(experiment: Experiment, fingerprint: str, task: TaskConfig) -> tuple[ImageClassifier, Preprocess]:
    """A fresh copy of the pretrained tower with the task's head."""
    encoder = artifacts.base_encoder(experiment.store, fingerprint)
    head = artifacts.load_head(Store(experiment.store), experiment, task, encoder)
    model: Any = encoder.model
    return ImageClassifier(copy.deepcopy(model.visual), head).eval(), encoder.preprocess


def score_task(experiment: Experiment, fingerprint: str, task: TaskConfig, round_: int,
               kept: np.ndarray | None) -> np.ndarray:
    """Scores (D,) float32 of one task in one round, the lowest to be kept; `kept` (D,) bool are still in the race."""
    worker_setup()
    classifier, preprocess = _classifier(experiment, fingerprint, task)
    parameters = {n: p.detach() for n, p in classifier.named_parameters()}
    seed = task_seed(experiment.seed, f"{task.name}/scores/{round_}")
    generator = torch.Generator().manual_seed(seed)
    if experiment.talos.select == "magnitude":
        return -flatten(parameters).abs().numpy()
    if experiment.talos.select == "random":
        return torch.rand(len(flatten(parameters)), generator=generator).numpy()
    if kept is not None:
        damped = damp(parameters, unflatten(torch.from_numpy(kept.copy()), parameters), experiment.talos.damping)
        classifier.load_state_dict(damped, strict=False)
    split = load_split(task, "train", preprocess, threads=threads(experiment), sample=experiment.talos.images,
                       generator=generator)
    place = device()
    images = preprocess.normalise(split.images.to(place))
    scores = flatten(fisher_scores(classifier.to(place), images, draws=experiment.talos.draws, generator=generator,
                                   precision=experiment.talos.precision))
    return (-scores if experiment.talos.select == "highest" else scores).cpu().numpy()


def add_scores(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Sum of two score vectors; the tree in which they are added is fixed by the order of the tasks."""
    return left + right


def select_round(experiment: Experiment, scores: np.ndarray, kept: np.ndarray | None, round_: int) -> np.ndarray:
    """The entries (D,) bool that are kept after round `round_` (1-based)."""
    density = round_density(experiment.talos.density, round_, experiment.talos.stages)
    before = None if kept is None else {"": torch.from_numpy(kept.copy())}
    return select_further({"": torch.from_numpy(scores.copy())}, before, density)[""].numpy()


def commit_shared_mask(experiment: Experiment, fingerprint: str, kept: np.ndarray) -> dict[str, int]:
    """Store the shared mask; returns its numbers of kept and of all entries."""
    state = artifacts.base_encoder(experiment.store, fingerprint).visual_state()
    mask = Mask.of(unflatten(torch.from_numpy(kept.copy()), state))
    artifacts.write_mask(Store(experiment.store), experiment, artifacts.SHARED_MASK, experiment.tasks, mask)
    return {"kept": mask.kept, "total": len(mask.bits)}


def own_mask(experiment: Experiment, fingerprint: str, task: TaskConfig) -> Mask:
    """A task's own mask: taken from the store, or made in staged rounds and committed."""
    store, mask_id = Store(experiment.store), task.name
    if records.find(store, artifacts.mask_prefix(mask_id), artifacts.mask_identity(experiment, [task])):
        return artifacts.load_mask(store, mask_id)
    kept: np.ndarray | None = None
    for round_ in range(1, experiment.talos.stages + 1):
        kept = select_round(experiment, score_task(experiment, fingerprint, task, round_, kept), kept, round_)
    assert kept is not None
    state = artifacts.base_encoder(experiment.store, fingerprint).visual_state()
    mask = Mask.of(unflatten(torch.from_numpy(kept), state))
    artifacts.write_mask(store, experiment, mask_id, [task], mask)
    return mask


def record_overlap(experiment: Experiment) -> None:
    """Store how far the tasks' own masks overlap, unless that is stored."""
    worker_setup()
    store = Store(experiment.store)
    if records.find(store, artifacts.OVERLAP, artifacts.mask_identity(experiment, experiment.tasks)) is None:
        artifacts.write_overlap(store, experiment)


def finetune_task(experiment: Experiment, fingerprint: str, task: TaskConfig) -> dict[str, Any]:
    """Fine-tune one task, from its checkpoint if it has one, and commit its vector; returns the record.

    Where bases are made of prepared vectors, the twin is there too afterwards.
    """
    worker_setup()
    store, prefix = Store(experiment.store), artifacts.vector_prefix(task.name)
    identity = artifacts.vector_identity(experiment, task)
    record = records.find(store, prefix, identity)
    if record is not None:
        prepare_vector(experiment, task)
        return record
    classifier, preprocess = _classifier(experiment, fingerprint, task)
    key, mask_id = artifacts.vector_key(task.name), ""
    parents = {"base": fingerprint}
    if experiment.talos.density == 1.0:
        tensors = {n: torch.ones_like(p, dtype=torch.bool) for n, p in classifier.named_parameters()}
        info = vector_info(fingerprint)
    else:
        shared = experiment.talos.mask == "shared"
        mask_id = artifacts.SHARED_MASK if shared else task.name
        mask = artifacts.load_mask(store, mask_id) if shared else own_mask(experiment, fingerprint, task)
        tensors = mask.tensors()
        path = os.path.relpath(f"{artifacts.mask_prefix(mask_id)}/mask.safetensors", prefix)
        info = vector_info(fingerprint, mask_path=path, mask=mask.fingerprint)
        parents["mask"] = mask.fingerprint
    split = load_split(task, "train", preprocess, threads=threads(experiment))
    config = experiment.finetune.model_copy(update={"epochs": task.epochs or experiment.finetune.epochs})
    try:
        tuned = finetune(classifier, split, tensors, config, preprocess,
                         seed=task_seed(experiment.seed, task.name), device=device(),
                         start=artifacts.load_checkpoint(store, experiment, task),
                         save=partial(artifacts.write_checkpoint, store, experiment, task),
                         save_every_s=experiment.resources.checkpoint_s)
    except UserError as error:
        good = artifacts.load_checkpoint(store, experiment, task)
        kept = "" if good is None else (f"; its last good checkpoint, after step {good.step}, is kept in "
                                        f"{store.where(artifacts.checkpoint_prefix(task.name))}")
        raise UserError(f"task {task.name}: {error} (that is another experiment, with another store){kept}") from None
    artifacts.check_finite(tuned.values, store.where(key))
    metrics = {"steps": tuned.steps, "final_loss": tuned.final_loss, "seconds": tuned.seconds, "images": len(split),
               "skipped": split.skipped, "classes_without_images": len(split.classes) - len(split.labels.unique()),
               "norm": float(sum(v.double().square().sum() for v in tuned.values.values()) ** 0.5)}
    head = store.read(f"{prefix}/head.safetensors")
    files = {"vector.safetensors": vector_bytes(tuned.values, info)}
    record = records.commit(store, prefix, identity=identity, files=files,
                            written={"head.safetensors": records.FileInfo.of(head)}, parents=parents, metrics=metrics)
    store.delete(artifacts.checkpoint_prefix(task.name))
    prepare_vector(experiment, task)
    return record


def prepare_vector(experiment: Experiment, task: TaskConfig) -> None:
    """Commit the prepared twin of a task's vector where bases are made of those, unless that of this vector is there.

    Raises UserError where the vector has not been committed, VectorError where its bytes are not those recorded.
    """
    name = experiment.basis.prepare
    if name == "none":
        return
    worker_setup()
    store, prefix = Store(experiment.store), artifacts.basis_vector_prefix(experiment, task.name)
    record = records.find(store, artifacts.vector_prefix(task.name), artifacts.vector_identity(experiment, task))
    if record is None:
        raise UserError(f"{store.where(artifacts.vector_key(task.name))} is missing: run `raytvb finetune` first")
    identity = artifacts.prepared_identity(experiment, task)
    if artifacts.basis_vector_record(store, experiment, task.name) is not None:
        records.find(store, prefix, identity)
        return
    info = records.FileInfo.from_json(record["files"]["vector.safetensors"])
    copies = artifacts.Mirror(store)  # its own: the process's may hold a vector that was made again since
    vector = copies.vector(artifacts.vector_key(task.name))
    if not info.is_of(copies.local.read(vector.key)):
        raise damaged(store, vector.key)
    values = prepared(vector, name, task_seed(experiment.seed, f"{task.name}/prepare"))
    path = None if vector.mask is None else os.path.relpath(vector.mask_key, prefix)
    mask = None if vector.mask is None else vector.mask.fingerprint
    data = vector_bytes(values, vector_info(vector.info["base"], mask_path=path, mask=mask))
    store.delete(prefix)  # the twin of another vector
    records.commit(store, prefix, identity=identity, files={"vector.safetensors": data},
                   parents={"vector": info.sha256} | ({} if mask is None else {"mask": mask}),
                   metrics={"norm": float(sum(v.double().square().sum() for v in values.values()) ** 0.5),
                            "nonzero": sum(int(v.count_nonzero()) for v in values.values())})


def evaluation_split(experiment: Experiment, fingerprint: str, task: TaskConfig,
                     split: str) -> tuple[int, dict[str, Any]]:
    """Images of a split that could not be read, and the rest with labels as plain arrays, which workers of a node
    share in Ray's object store. They are decoded once and then come from the store."""
    worker_setup()
    preprocess = artifacts.base_encoder(experiment.store, fingerprint).preprocess
    loaded = cached_split(Store(experiment.store), task, split, preprocess, threads=threads(experiment))
    return loaded.skipped, {"images": loaded.images.numpy(), "labels": loaded.labels.numpy(), "classes": loaded.classes}


def make_evaluator(experiment: Experiment, fingerprint: str, arrays: Mapping[str, Mapping[str, Any]],
                   precision: str = "fp32") -> Evaluator:
    """An evaluator over the given splits, whose directions have the coordinates of the experiment's vectors."""
    encoder, store = artifacts.base_encoder(experiment.store, fingerprint), Store(experiment.store)
    named = {t.name: t for t in experiment.every_task}
    heads = {n: artifacts.load_head(store, experiment, named[n], encoder) for n in arrays}
    # Arrays from Ray's object store are read-only; tensors over them are only read here.
    splits = {n: Split(_tensor(a["images"]), _tensor(a["labels"]), tuple(a["classes"])) for n, a in arrays.items()}
    vectors = artifacts.vector_set(experiment.store, experiment.task_names)
    model: Any = encoder.model
    return Evaluator(copy.deepcopy(model.visual), heads, splits, encoder.preprocess, device=device(),
                     mask=None if vectors.mask is None else vectors.mask.load().tensors(), precision=precision)


def compare_precisions(experiment: Experiment, fingerprint: str,
                       arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether bf16 may be used: on validation images, it must keep KEPT_ANSWERS of the answers of float32.

    Of the pretrained model, and of that with the mean task vector added. Returns `use`, the `agreement` on all images
    (of the worse model), that of the worst task, the number of images, and the device. On a CPU only `precision: bf16`
    asks for it, as most compute it slower.
    """
    place = device()
    if experiment.evaluate.precision == "fp32" or (experiment.evaluate.precision == "auto" and place.type == "cpu"):
        return {"use": "fp32", "device": place.type}
    evaluators = {p: make_evaluator(experiment, fingerprint, arrays, p) for p in ("fp32", "bf16")}
    count = len(experiment.tasks)
    mean_vector = next(artifacts.vector_set(experiment.store, experiment.task_names).combinations(
        torch.full((count, 1), 1.0 / count, dtype=torch.float64)))
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
    return {"use": "bf16" if agreement >= KEPT_ANSWERS else "fp32", "agreement": agreement, "worst_task": worst,
            "images": images, "device": place.type}


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor over an array, without a copy; torch warns of read-only ones, which are never written to here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
