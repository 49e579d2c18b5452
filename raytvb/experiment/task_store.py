"""One task of an experiment in its store: made once, then carried from room to room.

A fine-tune, its checkpoint, its mask, the vector's twin and the basis all need the same identity,
keys and records of one task. They are worked out here, each once, when they are first asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import mask_identity, twin_identity, vector_identity
from raytvb.experiment.layout import (
    SHARED_MASK,
    VECTOR,
    basis_vector_prefix,
    checkpoint_prefix,
    head_key,
    mask_prefix,
    vector_prefix,
)
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.storage import records
from raytvb.storage.contract import JsonObject
from raytvb.storage.records import Record
from raytvb.storage.store import Store


@dataclass(frozen=True)
class TaskStore:
    """Keys, identities and records of one task.

    The methods ask the store anew each time they are called; all else touches no storage.
    """

    experiment: Experiment
    task: TaskConfig

    @cached_property
    def store(self) -> Store:
        """The experiment's store."""
        return Store(self.experiment.store)

    @cached_property
    def identity(self) -> JsonObject:
        """Identity of the task vector, and of the checkpoints of its fine-tune."""
        return vector_identity(self.experiment, self.task)

    @cached_property
    def twin_identity(self) -> JsonObject:
        """Identity of the vector's prepared twin."""
        return twin_identity(self.experiment, self.task)

    @cached_property
    def mask_identity(self) -> JsonObject:
        """Identity of the task's own mask."""
        return mask_identity(self.experiment, [self.task])

    @property
    def prefix(self) -> str:
        """Folder of the task vector, its head and their record."""
        return vector_prefix(self.task.name)

    @property
    def vector_key(self) -> str:
        """The task vector."""
        return f"{self.prefix}/{VECTOR}"

    @property
    def head_key(self) -> str:
        """The zero-shot head; that of a control or unseen task lies with the pretrained model."""
        return head_key(self.experiment, self.task)

    @property
    def checkpoint_prefix(self) -> str:
        """Folder of the checkpoint of a fine-tune that has not ended."""
        return checkpoint_prefix(self.task.name)

    @property
    def mask_id(self) -> str | None:
        """Which mask the fine-tune uses: the shared one, the task's own, or None for no mask."""
        talos = self.experiment.talos
        if talos.density == 1.0:
            return None
        return SHARED_MASK if talos.mask == "shared" else self.task.name

    @property
    def own_mask_prefix(self) -> str:
        """Folder of the task's own mask."""
        return mask_prefix(self.task.name)

    @property
    def has_twin(self) -> bool:
        """Whether bases are made of a prepared twin of the vector instead of the vector itself."""
        return self.experiment.basis.prepare != "none"

    @property
    def basis_vector_prefix(self) -> str:
        """Folder of the vector that bases are made of: the task vector, or its prepared twin."""
        return basis_vector_prefix(self.experiment, self.task.name)

    @property
    def basis_vector_key(self) -> str:
        """The vector that bases are made of."""
        return f"{self.basis_vector_prefix}/{VECTOR}"

    def record(self) -> Record | None:
        """Record of the task vector; None where it has not been committed.

        Raises UserError where it was made with other settings.
        """
        return records.find(self.store, self.prefix, self.identity)

    def basis_vector(self) -> Record | None:
        """Record of the vector that bases are made of; None where it has not been committed.

        A twin of another version of the task vector counts as not committed.
        """
        record = records.find(self.store, self.prefix)
        if record is None or not self.has_twin:
            return record
        return self.twin_of(record)

    def twin_of(self, vector: Record) -> Record | None:
        """Record of the prepared twin; None where there is none of this version of the vector."""
        twin = records.find(self.store, self.basis_vector_prefix)
        if twin is None or twin.parents["vector"] != vector.files[VECTOR].sha256:
            return None
        return twin


def task_stores(experiment: Experiment) -> dict[str, TaskStore]:
    """One for each task of the experiment, by its name."""
    return {task.name: TaskStore(experiment, task) for task in experiment.tasks}
