"""Checkpoints of fine-tunes that have not ended."""

from __future__ import annotations

import torch
from safetensors.torch import save

from raytvb.experiment.metrics import CheckpointMetrics
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.training_loop import Checkpoint
from raytvb.storage import records
from raytvb.storage.damage import DamagedError
from raytvb.storage.records import Record
from raytvb.storage.tensor_file import tensor_of, tensors_of


class CheckpointFolder:
    """Where one fine-tune keeps its latest checkpoint."""

    latest: int | None = None
    """Number of steps in the checkpoint that was last loaded or saved; None before that."""

    def __init__(self, task_store: TaskStore) -> None:
        """Touches no storage."""
        self._task_store, self._store = task_store, task_store.store
        self._prefix = task_store.checkpoint_prefix

    @property
    def where(self) -> str:
        """The folder's URL or path, for messages."""
        return self._store.where(self._prefix)

    def load(self) -> Checkpoint | None:
        """The checkpoint to go on from; None if there is no whole one.

        A damaged checkpoint counts as none: the fine-tune begins anew, and its next checkpoint
        takes the place of this one. So does a checkpoint of a fine-tune with other settings.
        """
        try:
            record = self._task_store.checkpoint()
            checkpoint = None if record is None else self._checkpoint(record)
        except DamagedError:
            return None
        if checkpoint is not None:
            self.latest = checkpoint.step
        return checkpoint

    def _checkpoint(self, record: Record) -> Checkpoint | None:
        """The checkpoint that a record describes. Raises DamagedError if it is not whole."""
        if len(record.files) != 1:
            return None
        (name,) = record.files
        where = self._store.where(f"{self._prefix}/{name}")
        tensors = tensors_of(records.read_file(self._store, self._prefix, name, record), where)
        tensor_of(tensors, "values", torch.float32, 1, where)
        tensor_of(tensors, "rng", torch.uint8, 1, where)
        metrics = record.metrics_as(CheckpointMetrics, self.where)
        return Checkpoint(metrics.step, metrics.loss, metrics.seconds, tensors)

    def save(self, checkpoint: Checkpoint) -> None:
        """Store a checkpoint. The one before is deleted when this one is whole."""
        name = f"step-{checkpoint.step:07d}.safetensors"
        records.commit(
            self._store,
            self._prefix,
            identity=self._task_store.checkpoint_identity,
            metrics=CheckpointMetrics(
                step=checkpoint.step, loss=checkpoint.loss, seconds=checkpoint.seconds
            ),
            files={name: save(checkpoint.tensors)},
        )
        self.latest = checkpoint.step
        current = (f"{self._prefix}/{name}", f"{self._prefix}/{records.RECORD}")
        for key in self._store.keys(self._prefix):
            if key not in current:
                self._store.delete(key)

    def delete(self) -> None:
        """Delete the checkpoint, and files that a killed writer may have left."""
        self._store.delete(self._prefix)
