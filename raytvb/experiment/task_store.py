"""One task of an experiment in its store. Callers make the object once and pass it along.

A fine-tune, its checkpoint, its mask, the vector's twin and the basis all need the same identities,
keys and records of one task. This class computes each of them once, when it is first needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import (
    mask_identity,
    twin_identity,
    twin_settings,
    vector_identity,
    vector_settings,
)
from raytvb.experiment.layout import (
    basis_vector_prefix,
    checkpoint_prefix,
    head_prefix,
    mask_prefix,
    vector_prefix,
)
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.shared_masks import SharedMask, find_shared_mask
from raytvb.experiment.stored_vectors import StoredVector, find_vector, is_twin_of, library
from raytvb.experiment.vector_states import VectorState, state_of
from raytvb.storage import records
from raytvb.storage.contract import JsonObject
from raytvb.storage.records import Record
from raytvb.storage.store import Store


@dataclass(frozen=True)
class TaskStore:
    """Keys, identities and records of one task.

    The methods read the store each time they are called. Of the properties, only `shared_mask` and
    `checkpoint_identity` read it, once.
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
    def head_prefix(self) -> str:
        """Folder of the zero-shot head."""
        return head_prefix(self.task.name)

    @property
    def checkpoint_prefix(self) -> str:
        """Folder of the checkpoint of a fine-tune that has not ended."""
        return checkpoint_prefix(self.task.name)

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

    @cached_property
    def shared_mask(self) -> SharedMask | None:
        """The mask that all tasks share; None if they do not share one, or if it is missing.

        Read from the store at the first use. Raises UserError if it was made with other settings.
        """
        return (
            find_shared_mask(self.store, self.experiment) if self.experiment.shares_mask else None
        )

    def vector(self) -> StoredVector | None:
        """The task vector, whatever its settings; None if there is none."""
        return find_vector(self.store, library(self.experiment), self.task.name)

    def own_vector(self) -> bool:
        """Whether the vector lies in the experiment's own store."""
        vector = self.vector()
        return vector is not None and vector.store.url == self.store.url

    def state(self) -> VectorState:
        """The task vector, and why it is to be made again if it is."""
        vector = self.vector()
        mask = None if vector is None else self.shared_mask
        return state_of(self.experiment, self.task, vector, mask)

    def record(self) -> Record | None:
        """Record of the task vector; None if there is none, or if it is to be made again."""
        state = self.state()
        return state.vector.record if state.vector is not None and state.is_current else None

    def checkpoint(self) -> Record | None:
        """Record of the checkpoint; None if there is none, or if it is of other settings."""
        record = records.find(self.store, self.checkpoint_prefix)
        if record is None:
            return None
        mask, identity = self.shared_mask, dict(record.identity)
        trained_on = identity.pop("mask", None)  # stores of earlier formats have only one mask
        if mask is not None and trained_on not in (None, mask.fingerprint):
            return None
        is_same = vector_settings(identity) == vector_settings(self.identity)
        return record if is_same else None

    @cached_property
    def checkpoint_identity(self) -> JsonObject:
        """Identity of a checkpoint: that of the vector, and the shared mask that is trained on."""
        mask = self.shared_mask
        return self.identity if mask is None else {**self.identity, "mask": mask.fingerprint}

    def twin(self) -> Record | None:
        """Record of the prepared twin, whatever it was made of; None if there is none."""
        return records.find(self.store, self.basis_vector_prefix)

    def is_twin(self, record: Record, vector: StoredVector) -> bool:
        """Whether this is the record of a twin of this version of the vector, as asked for."""
        twin = StoredVector(self.task.name, self.store, self.basis_vector_prefix, record)
        wanted = twin_settings(self.twin_identity)
        return is_twin_of(twin, vector) and twin_settings(record.identity) == wanted
