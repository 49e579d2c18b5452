"""Which stored vectors are those that an experiment asks for, and in what the others differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import vector_identity, vector_settings
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.shared_masks import SharedMask, find_shared_mask
from raytvb.experiment.stored_vectors import StoredVector, vectors_of
from raytvb.storage.records import differences
from raytvb.storage.store import Store


@dataclass(frozen=True)
class VectorState:
    """A task of an experiment, and the vector that is stored for it."""

    task: TaskConfig
    vector: StoredVector | None
    """The stored vector, whatever its settings; None if there is none."""
    differing: tuple[str, ...] = ()
    """What the stored vector differs in from what is asked for, one line each."""

    @property
    def is_current(self) -> bool:
        """Whether the vector is there as it is asked for."""
        return self.vector is not None and not self.differing

    @property
    def is_outdated(self) -> bool:
        """Whether there is a vector, which is to be made again."""
        return self.vector is not None and bool(self.differing)

    def is_borrowed(self, own: Store) -> bool:
        """Whether the vector lies in another store than the experiment's own."""
        return self.vector is not None and self.vector.store.url != own.url


def state_of(
    experiment: Experiment,
    task: TaskConfig,
    vector: StoredVector | None,
    mask: SharedMask | None,
) -> VectorState:
    """The state of one task.

    mask: the mask that all tasks share; None if they do not share one, or if it is missing, which
    makes no vector outdated.
    """
    if vector is None:
        return VectorState(task, None)
    wanted = vector_settings(vector_identity(experiment, task))
    differing = differences(vector_settings(vector.record.identity), wanted)
    if mask is not None and vector.mask != mask.fingerprint and not differing:
        differing = [f"mask: trained on another mask than {mask.where}"]
    return VectorState(task, vector, tuple(differing))


def fitting_vectors(
    experiment: Experiment, vectors: Mapping[str, StoredVector]
) -> dict[str, StoredVector]:
    """Those of some vectors that have the coordinates of the experiment's vectors, by task.

    Vectors with masks of their own all fit each other. Others must have the mask in force.
    """
    if experiment.own_masks:
        is_alone = len(experiment.tasks) == 1  # its coordinates are those of its own mask
        names = set(experiment.task_names) if is_alone else set(vectors)
        return {task: vector for task, vector in vectors.items() if task in names}
    mask = find_shared_mask(Store(experiment.store), experiment) if experiment.shares_mask else None
    if experiment.shares_mask and mask is None:
        return dict(vectors)
    wanted = None if mask is None else mask.fingerprint
    return {task: vector for task, vector in vectors.items() if vector.mask == wanted}


def vector_states(
    experiment: Experiment, mask: SharedMask | None, tasks: Iterable[TaskConfig] | None = None
) -> dict[str, VectorState]:
    """The states of tasks of an experiment, by name. tasks: default: all that have vectors."""
    listed = experiment.tasks if tasks is None else tuple(tasks)
    stored = vectors_of(experiment, [task.name for task in listed])
    states = {}
    for task in listed:
        states[task.name] = state_of(experiment, task, stored.get(task.name), mask)
    return states


def borrowed_error(state: VectorState) -> UserError:
    """The error about a vector of another store, which is only read, with other settings."""
    assert state.vector is not None
    return UserError(
        f"{state.vector.where} was made with other settings:\n  "
        + "\n  ".join(state.differing)
        + f"\nGive task {state.task.name} these settings, or another name to fine-tune it here."
    )
