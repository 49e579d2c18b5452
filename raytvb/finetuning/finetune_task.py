"""The fine-tune of one task, from the pretrained model to a committed vector.

How the room works, in reading order: `finetune_task` in this module goes through the steps. `masks`
makes the mask of trainable entries. `training_loop` trains, and knows no store. `checkpoints` keeps
fine-tunes that have not ended. `twins` makes the prepared twin of a vector (see there). Every step
gets a `TaskStore`, which has the identity and the keys of the task.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone

import torch
from torch import Tensor, nn

from raytvb.data.load_split import load_split
from raytvb.data.splits import Split
from raytvb.errors import UserError, VectorError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import SHARED_MASK, mask_prefix
from raytvb.experiment.metrics import Made, VectorMetrics
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.stored_vectors import StoredVector
from raytvb.experiment.task_store import TaskStore
from raytvb.experiment.vector_states import VectorState, borrowed_error
from raytvb.finetuning.checkpoints import CheckpointFolder
from raytvb.finetuning.interruption import noted_interruption
from raytvb.finetuning.masks import drop_old_masks, load_mask, made_mask, own_mask
from raytvb.finetuning.training_loop import Finetuned, finetune
from raytvb.finetuning.twins import norm, write_twin
from raytvb.maths.finite import listed, not_finite
from raytvb.maths.seeds import task_seed
from raytvb.models.pretrained_task import PretrainedTask
from raytvb.models.worker_process import device, threads, worker_setup
from raytvb.storage.damage import DamagedError
from raytvb.storage.masks import Mask
from raytvb.storage.records import Record
from raytvb.storage.replacing import commit_version
from raytvb.storage.vectors import VECTOR, VectorInfo, vector_bytes, vector_info


def finetune_task(experiment: Experiment, fingerprint: str, task: TaskConfig) -> Record:
    """Fine-tune one task and commit its vector, unless that is stored. Returns its record.

    Goes on from a checkpoint if the task has one. If bases are made of prepared twins, the twin is
    stored as well. fingerprint: of the pretrained model.

    A stored vector with other settings, or on another mask, is replaced when the new one is whole.
    Raises UserError if images or model cannot be used, if the training diverges, and for a vector
    of another store that has other settings.
    """
    worker_setup()
    task_store = TaskStore(experiment, task)
    state = task_store.state()
    vector = state.vector
    if vector is None or not state.is_current:
        if state.is_borrowed(task_store.store):
            raise borrowed_error(state)
        record = _train_and_commit(task_store, fingerprint, state)
        vector = StoredVector(task.name, task_store.store, task_store.prefix, record)
    write_twin(task_store, vector)
    return vector.record


@dataclass(frozen=True)
class _Trainable:
    """The entries of the tower that are trained."""

    mask: Mask | None
    """The entries that are trained; None if all are."""
    info: VectorInfo
    """Metadata of the vector file."""
    scored: tuple[str, ...] | None = None
    """The tasks that a shared mask was scored on; None for any other mask."""

    def tensors(self, classifier: nn.Module) -> dict[str, Tensor]:
        """A bool tensor for each parameter."""
        if self.mask is not None:
            return self.mask.tensors()
        return {n: torch.ones_like(p, dtype=torch.bool) for n, p in classifier.named_parameters()}


def _train_and_commit(task_store: TaskStore, fingerprint: str, before: VectorState) -> Record:
    """Train a task, and commit its vector in the place of the one before."""
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
    _check_finite(tuned.values, task_store.store.where(task_store.prefix))
    overlap = _mask_overlap(task_store, pretrained, trainable)
    state = task_store.state()
    if state.vector is not None and state.is_current:
        # Another run has finished this task meanwhile. On GPUs its vector has other bits, and its
        # Gram matrix and bases name that vector, so the first one stays.
        checkpoints.delete()
        return state.vector.record
    parents = {"base": fingerprint, "head": pretrained.head.file.sha256}
    if trainable.mask is not None:
        parents["mask"] = trainable.mask.fingerprint
    record = commit_version(
        task_store.store,
        task_store.prefix,
        VECTOR,
        vector_bytes(tuned.values, trainable.info),
        before=None if state.vector is None else state.vector.record,
        identity=task_store.identity,
        parents=parents,
        metrics=_metrics(tuned, split, overlap, history_with(before)),
    )
    checkpoints.delete()
    drop_old_masks(task_store)
    return record


def history_with(before: VectorState) -> tuple[Made, ...]:
    """The history of a vector that has just been made. before: the state that it replaces."""
    earlier: tuple[Made, ...] = ()
    if before.vector is not None:
        with suppress(DamagedError):
            record, where = before.vector.record, before.vector.where
            earlier = record.metrics_as(VectorMetrics, where).history
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return (*earlier, Made(time=now, reason="; ".join(before.differing) or "new"))


def _mask_overlap(
    task_store: TaskStore, pretrained: PretrainedTask, trainable: _Trainable
) -> float | None:
    """Share of the entries of the task's own mask that the shared mask keeps.

    None if the shared mask was scored on the task, or if there is no such mask.
    """
    mask = trainable.mask
    by_sensitivity = task_store.experiment.talos.select in ("lowest", "highest")
    if mask is None or trainable.scored is None or not by_sensitivity:
        return None
    if task_store.task.name in trainable.scored:
        return None
    own = made_mask(task_store, pretrained)
    return int((own.bits & mask.bits).sum()) / own.kept


def _trainable(task_store: TaskStore, pretrained: PretrainedTask, fingerprint: str) -> _Trainable:
    """The mask that the experiment specifies: none, the shared mask, or the task's own."""
    experiment, scored = task_store.experiment, None
    if not experiment.shares_mask and not experiment.own_masks:
        return _Trainable(None, vector_info(fingerprint))
    if experiment.own_masks:
        mask, key = own_mask(task_store, pretrained)
    else:
        shared = task_store.shared_mask
        if shared is None:
            where = task_store.store.where(mask_prefix(SHARED_MASK))
            raise UserError(f"{where} is missing: run `raytvb finetune` again")
        mask, key, scored = load_mask(task_store.store, shared.key), shared.key, shared.scored
    path = os.path.relpath(key, task_store.prefix)
    info = vector_info(fingerprint, mask_path=path, mask=mask.fingerprint)
    return _Trainable(mask, info, scored)


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
    classifier = pretrained.classifier()
    try:
        with noted_interruption() as interrupted:
            return finetune(
                classifier,
                split,
                trainable.tensors(classifier),
                experiment.finetune_of(task),
                pretrained.preprocess,
                seed=task_seed(experiment.seed_of(task), task.name),
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
        raise UserError(f"task {task.name}: {error}{kept}") from None


def _metrics(
    tuned: Finetuned, split: Split, overlap: float | None, history: tuple[Made, ...]
) -> VectorMetrics:
    return VectorMetrics(
        steps=tuned.steps,
        final_loss=tuned.final_loss,
        seconds=tuned.seconds,
        images=len(split),
        skipped=split.skipped,
        classes_without_images=len(split.classes) - len(split.labels.unique()),
        norm=norm(tuned.values),
        mask_overlap=overlap,
        history=history,
    )


def _check_finite(values: Mapping[str, Tensor], where: str) -> None:
    """Raise VectorError that names the tensors with NaN or infinite values."""
    bad = not_finite(values)
    if bad:
        raise VectorError(
            f"{where} would have NaN or infinite values in {listed(bad)}", "lower finetune.lr"
        )
