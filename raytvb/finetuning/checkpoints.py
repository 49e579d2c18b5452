"""Checkpoints of fine-tunes that have not ended."""

from __future__ import annotations

from safetensors.torch import load, save

from raytvb.experiment.metrics import CheckpointMetrics
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.training_loop import Checkpoint
from raytvb.storage import records
from raytvb.storage.store_errors import StoreKeyError


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

        Raises UserError for a checkpoint of a fine-tune with other settings.
        """
        record = records.find(self._store, self._prefix, self._task_store.identity)
        if record is None or len(record.files) != 1:
            return None
        ((name, file),) = record.files.items()
        try:
            data = self._store.read(f"{self._prefix}/{name}")
        except StoreKeyError:
            return None
        if not file.is_of(data):
            return None
        metrics = record.metrics_as(CheckpointMetrics, self.where)
        self.latest = metrics.step
        return Checkpoint(metrics.step, metrics.loss, metrics.seconds, load(data))

    def save(self, checkpoint: Checkpoint) -> None:
        """Store a checkpoint. The one before is deleted when this one is whole."""
        name = f"step-{checkpoint.step:07d}.safetensors"
        records.commit(
            self._store,
            self._prefix,
            identity=self._task_store.identity,
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
