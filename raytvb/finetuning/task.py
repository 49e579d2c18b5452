"""One task: its mask, its fine-tune, its committed vector."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raytvb.data.loading import load_split
from raytvb.errors import UserError, VectorError
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import vector_identity
from raytvb.experiment.layout import (
    SHARED_MASK,
    checkpoint_prefix,
    mask_prefix,
    vector_key,
    vector_prefix,
)
from raytvb.experiment.tasks import TaskConfig
from raytvb.finetuning.checkpoints import load_checkpoint, write_checkpoint
from raytvb.finetuning.masks import fresh_classifier, load_mask, own_mask
from raytvb.finetuning.prepared import prepare_vector
from raytvb.finetuning.training import finetune
from raytvb.maths.seeds import task_seed
from raytvb.models.process import device, threads, worker_setup
from raytvb.storage import records
from raytvb.storage.store import Store
from raytvb.storage.vectors import vector_bytes, vector_info


def finetune_task(experiment: Experiment, fingerprint: str, task: TaskConfig) -> dict[str, Any]:
    """Fine-tune one task, from its checkpoint if it has one, and commit its vector; returns the
    record.

    Where bases are made of prepared vectors, the twin is there too afterwards.
    """
    worker_setup()
    store, prefix = Store(experiment.store), vector_prefix(task.name)
    identity = vector_identity(experiment, task)
    record = records.find(store, prefix, identity)
    if record is not None:
        prepare_vector(experiment, task)
        return record
    classifier, preprocess = fresh_classifier(experiment, fingerprint, task)
    key, mask_id = vector_key(task.name), ""
    parents = {"base": fingerprint}
    if experiment.talos.density == 1.0:
        tensors = {
            n: torch.ones_like(p, dtype=torch.bool) for n, p in classifier.named_parameters()
        }
        info = vector_info(fingerprint)
    else:
        shared = experiment.talos.mask == "shared"
        mask_id = SHARED_MASK if shared else task.name
        mask = load_mask(store, mask_id) if shared else own_mask(experiment, fingerprint, task)
        tensors = mask.tensors()
        path = os.path.relpath(f"{mask_prefix(mask_id)}/mask.safetensors", prefix)
        info = vector_info(fingerprint, mask_path=path, mask=mask.fingerprint)
        parents["mask"] = mask.fingerprint
    split = load_split(task, "train", preprocess, threads=threads(experiment))
    config = experiment.finetune.model_copy(
        update={"epochs": task.epochs or experiment.finetune.epochs}
    )
    try:
        tuned = finetune(
            classifier,
            split,
            tensors,
            config,
            preprocess,
            seed=task_seed(experiment.seed, task.name),
            device=device(),
            start=load_checkpoint(store, experiment, task),
            save=partial(write_checkpoint, store, experiment, task),
            save_every_s=experiment.resources.checkpoint_s,
        )
    except UserError as error:
        good = load_checkpoint(store, experiment, task)
        kept = (
            ""
            if good is None
            else (
                f"; its last good checkpoint, after step {good.step}, is kept in "
                f"{store.where(checkpoint_prefix(task.name))}"
            )
        )
        raise UserError(
            f"task {task.name}: {error} (that is another experiment, with another store){kept}"
        ) from None
    check_finite(tuned.values, store.where(key))
    metrics = {
        "steps": tuned.steps,
        "final_loss": tuned.final_loss,
        "seconds": tuned.seconds,
        "images": len(split),
        "skipped": split.skipped,
        "classes_without_images": len(split.classes) - len(split.labels.unique()),
        "norm": float(sum(v.double().square().sum() for v in tuned.values.values()) ** 0.5),
    }
    head = store.read(f"{prefix}/head.safetensors")
    files = {"vector.safetensors": vector_bytes(tuned.values, info)}
    record = records.commit(
        store,
        prefix,
        identity=identity,
        files=files,
        written={"head.safetensors": records.FileInfo.of(head)},
        parents=parents,
        metrics=metrics,
    )
    store.delete(checkpoint_prefix(task.name))
    prepare_vector(experiment, task)
    return record


def check_finite(values: Mapping[str, Tensor], where: str) -> None:
    """Raise VectorError that names the tensors with NaN or infinite values."""
    bad = [n for n, t in sorted(values.items()) if not bool(torch.isfinite(t).all())]
    if bad:
        raise VectorError(f"{where}: NaN or infinite values in {', '.join(bad)}")
