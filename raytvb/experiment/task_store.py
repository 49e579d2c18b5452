"""One task of an experiment in its store. Callers make the object once and pass it along.

A fine-tune, its checkpoint, its mask, the vector's twin and the basis all need the same identities,
keys and records of one task. This class computes each of them once, when it is first needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import (
    as_recorded,
    mask_identity,
    twin_identity,
    vector_identity,
)
from raytvb.experiment.layout import (
    SHARED_MASK,
    VECTOR,
    basis_vector_prefix,
    checkpoint_prefix,
    head_prefix,
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

    The methods read the store each time they are called. The properties do not touch it.
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
        """Folder of the task vector and its record."""
        return vector_prefix(self.task.name)

    @property
    def vector_key(self) -> str:
        """Key of the task vector."""
        return f"{self.prefix}/{VECTOR}"

    @property
    def head_prefix(self) -> str:
        """Folder of the zero-shot head."""
        return head_prefix(self.task.name)

    @property
    def checkpoint_prefix(self) -> str:
        """Folder of the checkpoint of a fine-tune that has not ended."""
        return checkpoint_prefix(self.task.name)

    @property
    def mask_id(self) -> str | None:
        """Id of the mask that the fine-tune uses, shared or the task's own; None for no mask."""
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
        """Whether bases use a prepared twin of the vector instead of the vector itself."""
        return self.experiment.basis.prepare != "none"

    @property
    def basis_vector_prefix(self) -> str:
        """Folder of the vector that bases use: the task vector, or its prepared twin."""
        return basis_vector_prefix(self.experiment, self.task.name)

    @property
    def basis_vector_key(self) -> str:
        """Key of the vector that bases use."""
        return f"{self.basis_vector_prefix}/{VECTOR}"

    def record(self) -> Record | None:
        """Record of the task vector; None if the vector has not been committed.

        Raises UserError if the vector was made with other settings.
        """
        return self._find(self.prefix, self.identity)

    def checkpoint(self) -> Record | None:
        """Record of the checkpoint; None if there is none. Raises UserError as `record`."""
        return self._find(self.checkpoint_prefix, self.identity)

    def check_twin(self) -> None:
        """Raise UserError if the prepared twin was made with other settings."""
        self._find(self.basis_vector_prefix, self.twin_identity)

    def _find(self, prefix: str, identity: JsonObject) -> Record | None:
        record = records.find(self.store, prefix)
        if record is not None:
            wanted = as_recorded(identity, record.identity)
            records.check_identity(self.store, prefix, record, wanted)
        return record

    def basis_vector(self) -> Record | None:
        """Record of the vector that bases use; None if it has not been committed.

        A twin of another version of the task vector counts as not committed.
        """
        record = records.find(self.store, self.prefix)
        if record is None or not self.has_twin:
            return record
        return self.twin_of(record)

    def twin_of(self, vector: Record) -> Record | None:
        """Record of the prepared twin; None if this version of the vector has no twin."""
        twin = records.find(self.store, self.basis_vector_prefix)
        if twin is None:
            return None
        file = vector.file(VECTOR, self.store.where(self.prefix))
        if twin.parent("vector", self.store.where(self.basis_vector_prefix)) != file.sha256:
            return None
        return twin


def task_stores(experiment: Experiment) -> dict[str, TaskStore]:
    """A `TaskStore` for each task of the experiment, by the task's name."""
    return {task.name: TaskStore(experiment, task) for task in experiment.tasks}
