"""The fine-tune of one task, from the pretrained model to a committed vector.

How the room works, in reading order: `finetune_task` in this module goes through the steps. `masks`
makes the mask of trainable entries. `training_loop` trains, and knows no store. `checkpoints` keeps
fine-tunes that have not ended. `twins` makes the prepared twin of a vector (see there). Every step
gets a `TaskStore`, which has the identity and the keys of the task.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raytvb.data.load_split import load_split
from raytvb.data.splits import Split
from raytvb.errors import UserError, VectorError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import SHARED_MASK, VECTOR, mask_key
from raytvb.experiment.metrics import VectorMetrics
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.checkpoints import CheckpointFolder
from raytvb.finetuning.interruption import noted_interruption
from raytvb.finetuning.masks import load_mask, own_mask
from raytvb.finetuning.training_loop import Finetuned, finetune
from raytvb.finetuning.twins import norm, write_twin
from raytvb.maths.finite import listed, not_finite
from raytvb.maths.seeds import task_seed
from raytvb.models.pretrained_task import PretrainedTask
from raytvb.models.worker_process import device, threads, worker_setup
from raytvb.storage import records
from raytvb.storage.masks import Mask
from raytvb.storage.records import Record
from raytvb.storage.vectors import VectorInfo, vector_bytes, vector_info


def finetune_task(experiment: Experiment, fingerprint: str, task: TaskConfig) -> Record:
    """Fine-tune one task and commit its vector, unless that is stored. Returns its record.

    Goes on from a checkpoint if the task has one. If bases are made of prepared twins, the twin is
    stored as well. fingerprint: of the pretrained model.

    Raises UserError if the stored vector or checkpoint has other settings, if images or model
    cannot be used, and if the training diverges.
    """
    worker_setup()
    task_store = TaskStore(experiment, task)
    record = task_store.record()
    if record is None:
        record = _train_and_commit(task_store, fingerprint)
    write_twin(task_store, record)
    return record


@dataclass(frozen=True)
class _Trainable:
    """The entries of the tower that are trained."""

    mask: Mask | None
    """The entries that are trained; None if all are."""
    info: VectorInfo
    """Metadata of the vector file."""

    def tensors(self, classifier: nn.Module) -> dict[str, Tensor]:
        """A bool tensor for each parameter."""
        if self.mask is not None:
            return self.mask.tensors()
        return {n: torch.ones_like(p, dtype=torch.bool) for n, p in classifier.named_parameters()}


def _train_and_commit(task_store: TaskStore, fingerprint: str) -> Record:
    """Train a task whose vector is not stored, and commit the vector."""
    experiment = task_store.experiment
    pretrained = PretrainedTask.load(task_store, fingerprint)
    trainable = _trainable(task_store, pretrained, fingerprint)
    split = load_split(
        task_store.task,
        "train",
        pretrained.preprocess,
        threads=threads(experiment),
        reading=experiment.data,
    )
    checkpoints = CheckpointFolder(task_store)
    tuned = _trained(task_store, pretrained, trainable, split, checkpoints)
    _check_finite(tuned.values, task_store.store.where(task_store.vector_key))
    finished = task_store.record()
    if finished is not None:
        # Another run has finished this task meanwhile. On GPUs its vector has other bits, and its
        # Gram matrix and bases name that vector, so the first one stays.
        checkpoints.delete()
        return finished
    parents = {"base": fingerprint, "head": pretrained.head.file.sha256}
    if trainable.mask is not None:
        parents["mask"] = trainable.mask.fingerprint
    record = records.commit(
        task_store.store,
        task_store.prefix,
        identity=task_store.identity,
        files={VECTOR: vector_bytes(tuned.values, trainable.info)},
        parents=parents,
        metrics=_metrics(tuned, split),
    )
    checkpoints.delete()
    return record


def _trainable(task_store: TaskStore, pretrained: PretrainedTask, fingerprint: str) -> _Trainable:
    """The mask that the experiment specifies: none, the shared mask, or the task's own."""
    mask_id = task_store.mask_id
    if mask_id is None:
        return _Trainable(None, vector_info(fingerprint))
    if mask_id == SHARED_MASK:
        mask = load_mask(task_store.store, mask_id)
    else:
        mask = own_mask(task_store, pretrained)
    path = os.path.relpath(mask_key(mask_id), task_store.prefix)
    return _Trainable(mask, vector_info(fingerprint, mask_path=path, mask=mask.fingerprint))


def _trained(
    task_store: TaskStore,
    pretrained: PretrainedTask,
    trainable: _Trainable,
    split: Split,
    checkpoints: CheckpointFolder,
) -> Finetuned:
    """Train from the latest checkpoint, or from the start.

    Raises KeyboardInterrupt, after it has saved a checkpoint, if the process is interrupted.
    """
    experiment, task = task_store.experiment, task_store.task
    epochs = task.epochs or experiment.finetune.epochs
    classifier = pretrained.classifier()
    try:
        with noted_interruption() as interrupted:
            return finetune(
                classifier,
                split,
                trainable.tensors(classifier),
                experiment.finetune.model_copy(update={"epochs": epochs}),
                pretrained.preprocess,
                seed=task_seed(experiment.seed, task.name),
                device=device(),
                start=checkpoints.load(),
                save=checkpoints.save,
                save_every_s=experiment.resources.checkpoint_s,
                interrupted=interrupted,
            )
    except UserError as error:
        kept = ""
        if checkpoints.latest is not None:
            kept = (
                f"; its last good checkpoint, after step {checkpoints.latest}, is kept in "
                f"{checkpoints.where}"
            )
        raise UserError(
            f"task {task.name}: {error} (that is another experiment, with another store){kept}"
        ) from None


def _metrics(tuned: Finetuned, split: Split) -> VectorMetrics:
    return VectorMetrics(
        steps=tuned.steps,
        final_loss=tuned.final_loss,
        seconds=tuned.seconds,
        images=len(split),
        skipped=split.skipped,
        classes_without_images=len(split.classes) - len(split.labels.unique()),
        norm=norm(tuned.values),
    )


def _check_finite(values: Mapping[str, Tensor], where: str) -> None:
    """Raise VectorError that names the tensors with NaN or infinite values."""
    bad = not_finite(values)
    if bad:
        raise VectorError(
            f"{where} would have NaN or infinite values in {listed(bad)}", "lower finetune.lr"
        )
