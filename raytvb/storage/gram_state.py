"""The Gram matrix of an experiment in its store, as it grows.

    gram/record.json, gram/<n>.safetensors   snapshot of the first n vectors; the record names the
                                             file
    gram/rows/<n>.safetensors                rows of the vectors that arrived after the first n
    gram/owner.json                          which writer may write: the latest one locks out all
                                             earlier ones

A row file says which vectors it belongs to, by a hash over all tasks and checksums so far. So the
matrix that is read is consistent, whichever file was written last. Whoever writes the matrix takes
no notice of damaged files, and adds their vectors again; whoever only reads it gets an error. A
snapshot is written when the number of vectors has grown by a
quarter. So the bytes written for an arrival grow with the number of vectors, not with its square.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from safetensors.torch import save
from torch import Tensor

from raytvb.errors import UserError
from raytvb.maths.gram_blocks import grown
from raytvb.storage import records
from raytvb.storage.contract import Contract
from raytvb.storage.damage import DamagedError, unreadable
from raytvb.storage.gram_rows import OWNER, PREFIX, ROWS, Arrival, RowsInfo, check_rows
from raytvb.storage.sealed_json import sealed, unsealed
from raytvb.storage.store import Store
from raytvb.storage.tensor_file import tensor_of, tensors_of


class Snapshot(Contract):
    """Metrics of the snapshot's record; its parents are the checksums of the vectors."""

    tasks: tuple[str, ...]
    """The tasks, in the order of their arrival."""
    history: tuple[Arrival, ...]


class Owner(Contract):
    """Who may write the Gram matrix."""

    generation: int
    """Number of writers so far."""
    token: str
    """Random string that the latest writer chose."""


@dataclass
class GramState:
    """Tasks in the order of their arrival, the checksums of their vectors, and the Gram matrix
    (T, T) float64 of these vectors.
    """

    tasks: list[str] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)
    gram: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    history: list[Arrival] = field(default_factory=list)
    """An item for some of the arrivals, in their order."""
    snapshot: int = 0
    """Number of vectors in the stored snapshot."""
    damaged: bool = False
    """Whether the store has a damaged file of the matrix, which the next snapshot replaces."""

    @property
    def known(self) -> list[tuple[str, str]]:
        """Tasks and checksums."""
        return [(task, self.checksums[task]) for task in self.tasks]

    @property
    def chain(self) -> str:
        """A hash over all tasks and checksums in their order."""
        return hashlib.sha256(json.dumps(self.known).encode()).hexdigest()

    def extend(self, known: Sequence[tuple[str, str]], rows: Tensor) -> None:
        """Add vectors.

        known: their tasks and checksums. rows: (new, T + new), their inner products with all
        vectors.
        """
        self.gram = grown(self.gram, rows)
        self.tasks += [task for task, _ in known]
        self.checksums |= dict(known)

    def forget(self, tasks: Sequence[str]) -> None:
        """Remove the vectors of these tasks, because they were made again."""
        keep = [i for i, task in enumerate(self.tasks) if task not in tasks]
        self.gram = self.gram[keep][:, keep]
        self.tasks = [self.tasks[i] for i in keep]
        self.checksums = {task: self.checksums[task] for task in self.tasks}

    def ordered(self, tasks: Sequence[str]) -> Tensor:
        """G in the order of the given tasks. Raises ValueError that names the missing tasks."""
        missing = [task for task in tasks if task not in self.checksums]
        if missing:
            raise ValueError(f"vectors not taken in yet: {', '.join(missing)}")
        order = [self.tasks.index(task) for task in tasks]
        return self.gram[order][:, order]

    @classmethod
    def read(cls, store: Store) -> GramState:
        """The state that the store has; an empty state if the store has none.

        Raises DamagedError for a damaged file, and UserError or VectorError for files of a newer
        raytvb.
        """
        state = cls._snapshot(store)
        while state._append_rows(store):
            continue
        return state

    @classmethod
    def undamaged(cls, store: Store) -> GramState:
        """As `read`, but only the state before a damaged file, if there is one.

        For whoever writes the matrix: the vectors are still in the store, and are added again.
        """
        try:
            state = cls._snapshot(store)
        except DamagedError:
            state = cls(damaged=True)
        try:
            while state._append_rows(store):
                continue
        except DamagedError:
            state.damaged = True
        return state

    @classmethod
    def _snapshot(cls, store: Store, attempts: int = 3) -> GramState:
        record = records.find(store, PREFIX)
        if record is None:
            return cls()
        where = store.where(f"{PREFIX}/{records.RECORD}")
        if len(record.files) != 1:
            raise unreadable(where, f"it lists {len(record.files)} files instead of one")
        (name,) = record.files
        try:
            data = records.read_file(store, PREFIX, name, record)
        except DamagedError:
            if attempts and records.find(store, PREFIX) != record:  # replaced since it was read
                return cls._snapshot(store, attempts - 1)
            raise
        snapshot = record.metrics_as(Snapshot, store.where(PREFIX))
        gram = _tensor(data, "gram", store.where(f"{PREFIX}/{name}"))
        count = len(snapshot.tasks)
        if sorted(record.parents) != sorted(snapshot.tasks) or gram.shape != (count, count):
            raise unreadable(where, "its tasks are not those of the matrix")
        return cls(
            list(snapshot.tasks),
            dict(record.parents),
            gram,
            list(snapshot.history),
            len(snapshot.tasks),
        )

    def _append_rows(self, store: Store) -> bool:
        """Add the vectors of the row file that follows.

        Returns False if there is none, or if it follows other vectors. Raises DamagedError for a
        damaged file.
        """
        key = f"{ROWS}/{len(self.tasks):06d}.safetensors"
        data = store.find(key)
        if data is None:
            return False
        info, rows = _parse_rows(data, store.where(key))
        if info.chain != self.chain or not info.vectors:
            return False
        names = {*self.tasks, *(task for task, _ in info.vectors)}
        if len(names) != len(self.tasks) + len(info.vectors):
            raise unreadable(store.where(key), "it has a task twice")
        if tuple(rows.shape) != (len(info.vectors), len(self.tasks) + len(info.vectors)):
            raise unreadable(store.where(key), f"its rows have the shape {tuple(rows.shape)}")
        self.extend(info.vectors, rows)
        self.history += info.history
        return True


def _parse_rows(data: bytes, where: str) -> tuple[RowsInfo, Tensor]:
    """Metadata and rows of a row file; `where` names the file. Raises as `check_rows`."""
    info = check_rows(data, where)
    return info, _tensor(data, "rows", where)


def _tensor(data: bytes, name: str, where: str) -> Tensor:
    """A float64 matrix in a safetensors file."""
    tensor = tensor_of(tensors_of(data, where), name, torch.float64, 2, where)
    if not bool(tensor.isfinite().all()):
        raise unreadable(where, f"{name} has NaN or infinite values")
    return tensor


class TakenOverError(UserError):
    """Another writer has been made since. What it has written must be read first."""


class GramWriter:
    """The right to write the Gram matrix of a store, until another writer is made."""

    def __init__(self, store: Store) -> None:
        """Takes the right over from the writer before."""
        self._store, self._token = store, uuid.uuid4().hex
        before = _owner(store)
        generation = 1 if before is None else before.generation + 1
        owner = Owner(generation=generation, token=self._token)
        store.write(OWNER, sealed(owner.to_json()))

    def check(self) -> None:
        """Raise TakenOverError if another writer has been made since."""
        owner = _owner(self._store)
        if owner is None or owner.token != self._token:
            raise TakenOverError(
                f"another run works on {self._store.url} and has taken over its Gram matrix: let "
                f"it finish, or stop it and run this again"
            )

    def append(
        self,
        state: GramState,
        known: Sequence[tuple[str, str]],
        rows: Tensor,
        history: Sequence[Arrival],
    ) -> None:
        """Extend the state by vectors. Their rows are stored, and a snapshot if it is due.

        known: tasks and checksums of the new vectors. rows: (new, T + new) float64, their inner
        products with all vectors. Raises TakenOverError as `check`.
        """
        self.check()
        info = RowsInfo(chain=state.chain, vectors=tuple(known), history=tuple(history))
        fields = {**info.to_json(), "sha256": info.checksum(rows.contiguous().numpy().tobytes())}
        data = save({"rows": rows.contiguous()}, metadata={"raytvb": json.dumps(fields)})
        self._store.write(f"{ROWS}/{len(state.tasks):06d}.safetensors", data)
        state.extend(known, rows)
        state.history += history
        if state.damaged or len(state.tasks) - state.snapshot >= max(16, state.snapshot // 4):
            self.save(state)

    def save(self, state: GramState) -> None:
        """Store a snapshot, and delete what it replaces. Raises TakenOverError as `check`."""
        self.check()
        count = len(state.tasks)
        before = self._store.keys(PREFIX)
        name = f"{count:06d}-{state.chain[:8]}.safetensors"
        records.commit(
            self._store,
            PREFIX,
            identity={},
            parents=state.checksums,
            metrics=Snapshot(tasks=tuple(state.tasks), history=tuple(state.history)),
            files={name: save({"gram": state.gram.contiguous()})},
        )
        state.snapshot, state.damaged = count, False
        kept = (OWNER, f"{PREFIX}/{name}", f"{PREFIX}/{records.RECORD}")
        for key in before:
            if key not in kept:
                self._store.delete(key)


def _owner(store: Store) -> Owner | None:
    """Who may write; None if nobody has yet, or if the file is damaged."""
    data, where = store.find(OWNER), store.where(OWNER)
    try:
        return None if data is None else Owner.from_json(unsealed(data, where), where)
    except DamagedError:
        return None
