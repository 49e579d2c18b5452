"""The Gram matrix of an experiment in its store, as it grows.

    gram/record.json, gram/<n>.safetensors   snapshot of the first n vectors; the record names the
                                             file
    gram/rows/<n>.safetensors                rows of the vectors that arrived after the first n
    gram/owner.json                          which writer may write: the latest one locks out all
                                             earlier ones

A row file says which vectors it belongs to, by a hash over all tasks and checksums so far. So the
matrix that is read is consistent, whichever file was written last. Damaged row files are ignored,
and their vectors are added again. A snapshot is written when the number of vectors has grown by a
quarter. So the bytes written for an arrival grow with the number of vectors, not with its square.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from raytvb.errors import UserError, VectorError
from raytvb.maths.gram_blocks import grown
from raytvb.storage import records
from raytvb.storage.contract import Contract, JsonObject, parse_json
from raytvb.storage.format_version import format_problem
from raytvb.storage.store import Store

PREFIX = "gram"

_OWNER = f"{PREFIX}/owner.json"
_ROWS = f"{PREFIX}/rows"


class Arrival(Contract):
    """How good bases could be after some vectors had arrived."""

    vectors: int
    """Number of vectors that had arrived."""
    floor: dict[int, float]
    """Least relative squared error of any basis, by its size M."""


class Snapshot(Contract):
    """Metrics of the snapshot's record; its parents are the checksums of the vectors."""

    tasks: tuple[str, ...]
    """The tasks, in the order of their arrival."""
    history: tuple[Arrival, ...]


class RowsInfo(Contract):
    """Metadata of a row file."""

    chain: str
    """`GramState.chain` of the vectors before the new ones."""
    vectors: tuple[tuple[str, str], ...]
    """Tasks and checksums of the new vectors."""
    history: tuple[Arrival, ...]
    sha256: str = ""
    """Checksum over the other fields and the rows."""

    def checksum(self, rows: Tensor) -> str:
        """The value that `sha256` must have for these rows, (new, T + new) float64."""
        fields = self.to_json()
        del fields["sha256"]
        text = json.dumps(fields, sort_keys=True).encode()
        return hashlib.sha256(text + rows.contiguous().numpy().tobytes()).hexdigest()


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

        Raises UserError, StoreError and VectorError for files that are those of a newer raytvb, or
        may be, and StoreError for a record that cannot be read.
        """
        state = cls._snapshot(store)
        while True:
            key = f"{_ROWS}/{len(state.tasks):06d}.safetensors"
            data = store.find(key)
            if data is None or not state._append(data, store.where(key)):
                return state

    @classmethod
    def _snapshot(cls, store: Store, attempts: int = 3) -> GramState:
        record = records.find(store, PREFIX)
        if record is None:
            return cls()
        if len(record.files) != 1:
            return cls()  # damaged, as if its file were: see below
        ((name, info),) = record.files.items()
        data = store.find(f"{PREFIX}/{name}")
        if data is None:  # replaced since the record was read
            return cls._snapshot(store, attempts - 1) if attempts else cls()
        if not info.is_of(data):
            return cls()  # damaged: the vectors are still in the store, and will be added again
        snapshot = record.metrics_as(Snapshot, store.where(PREFIX))
        return cls(
            list(snapshot.tasks),
            dict(record.parents),
            load(data)["gram"],
            list(snapshot.history),
            len(snapshot.tasks),
        )

    def _append(self, data: bytes, where: str) -> bool:
        """Add the vectors of a row file.

        Returns False if the file is damaged or follows other vectors. Then the vectors in it will
        be added again.
        """
        parsed = _parse_rows(data, where)
        if parsed is None:
            return False
        info, rows = parsed
        belongs = info.chain == self.chain and info.sha256 == info.checksum(rows)
        if not belongs or not info.vectors:
            return False
        self.extend(info.vectors, rows)
        self.history += info.history
        return True


def _parse_rows(data: bytes, where: str) -> tuple[RowsInfo, Tensor] | None:
    """Metadata and rows of a row file; None if it is damaged.

    Raises VectorError for a file whose format this raytvb does not know.
    """
    fields = _metadata(data)
    problem = None if fields is None else format_problem(fields, where)
    if problem is not None:
        raise VectorError(problem.reason, problem.remedy)
    try:
        return RowsInfo.model_validate(fields), load(data)["rows"]
    except (ValueError, KeyError, SafetensorError):
        return None


def _metadata(data: bytes) -> JsonObject | None:
    """Our metadata of a safetensors file in memory; None where it is damaged."""
    length = int.from_bytes(data[:8], "little")
    try:
        fields = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["raytvb"])
    except (ValueError, KeyError, TypeError):
        return None
    return fields if isinstance(fields, dict) else None


class GramWriter:
    """The right to write the Gram matrix of a store, until another writer is made."""

    def __init__(self, store: Store) -> None:
        """Takes the right over from the writer before."""
        self._store, self._token = store, uuid.uuid4().hex
        owner = _owner(store)
        generation = 1 if owner is None else owner.generation + 1
        store.write_json(_OWNER, Owner(generation=generation, token=self._token).to_json())

    def check(self) -> None:
        """Raise UserError if another writer has been made since."""
        owner = _owner(self._store)
        if owner is None or owner.token != self._token:
            raise UserError(
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
        products with all vectors. Raises UserError as `check`.
        """
        self.check()
        info = RowsInfo(chain=state.chain, vectors=tuple(known), history=tuple(history))
        fields = {**info.to_json(), "sha256": info.checksum(rows)}
        data = save({"rows": rows.contiguous()}, metadata={"raytvb": json.dumps(fields)})
        self._store.write(f"{_ROWS}/{len(state.tasks):06d}.safetensors", data)
        state.extend(known, rows)
        state.history += history
        if len(state.tasks) - state.snapshot >= max(16, state.snapshot // 4):
            self.save(state)

    def save(self, state: GramState) -> None:
        """Store a snapshot, and delete what it replaces. Raises UserError as `check`."""
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
        state.snapshot = count
        kept = (_OWNER, f"{PREFIX}/{name}", f"{PREFIX}/{records.RECORD}")
        for key in before:
            if key not in kept:
                self._store.delete(key)


def _owner(store: Store) -> Owner | None:
    data, where = store.find(_OWNER), store.where(_OWNER)
    return None if data is None else Owner.from_json(parse_json(data, where), where)
