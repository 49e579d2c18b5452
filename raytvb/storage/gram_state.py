"""The Gram matrix of an experiment in its store, as it grows: a snapshot, and a small file for each
arrival since.

    gram/record.json, gram/<n>.safetensors      snapshot of the first n vectors; the record names
    the file gram/rows/<n>.safetensors                   rows of the vectors that came when n were
    there gram/owner.json                             which actor may write: the latest one fences
    those before

A row file says which vectors it belongs to (by a hash over all tasks and checksums so far), so
whatever was written last, what is read is consistent; damaged ones are left out, and their vectors
added again. Snapshots are made when the rows have grown by a quarter: what an arrival writes grows
with the number of vectors, not with its square.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from raytvb.errors import UserError
from raytvb.maths.gram import grown
from raytvb.storage import records
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreKeyError

PREFIX = "gram"


_OWNER = f"{PREFIX}/owner.json"


_ROWS = f"{PREFIX}/rows"


def _checksum(info: dict[str, Any], rows: Tensor) -> str:
    """sha256 of all that a row file says."""
    said = {k: v for k, v in info.items() if k != "sha256"}
    return hashlib.sha256(
        json.dumps(said, sort_keys=True).encode() + rows.contiguous().numpy().tobytes()
    ).hexdigest()


@dataclass
class GramState:
    """Tasks in the order of their arrival, the checksum of each one's vector, and their G (T, T)
    float64.
    """

    tasks: list[str] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)
    gram: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    history: list[dict[str, Any]] = field(default_factory=list)
    """{vectors, floor: {size: least relative error}} after some of the arrivals."""
    snapshot: int = 0
    """Vectors in the stored snapshot."""

    @property
    def known(self) -> list[tuple[str, str]]:
        """Tasks and checksums."""
        return [(task, self.checksums[task]) for task in self.tasks]

    @property
    def chain(self) -> str:
        """A hash over all tasks and checksums in their order."""
        return hashlib.sha256(json.dumps(self.known).encode()).hexdigest()

    def extend(self, known: Sequence[tuple[str, str]], rows: Tensor) -> None:
        """Add vectors; rows (new, T + new) are their inner products with all."""
        self.gram = grown(self.gram, rows)
        self.tasks += [task for task, _ in known]
        self.checksums |= dict(known)

    def forget(self, tasks: Sequence[str]) -> None:
        """Leave vectors out, for they were made again."""
        keep = [i for i, task in enumerate(self.tasks) if task not in tasks]
        self.gram, self.tasks = self.gram[keep][:, keep], [self.tasks[i] for i in keep]
        self.checksums = {task: self.checksums[task] for task in self.tasks}

    def ordered(self, tasks: Sequence[str]) -> Tensor:
        """G in the order of the given tasks. Raises ValueError that names those which are not
        there.
        """
        missing = [t for t in tasks if t not in self.checksums]
        if missing:
            raise ValueError(f"vectors not taken in yet: {', '.join(missing)}")
        order = [self.tasks.index(t) for t in tasks]
        return self.gram[order][:, order]

    @classmethod
    def read(cls, store: Store) -> GramState:
        """What the store knows; empty where that is nothing."""
        state = cls._snapshot(store)
        while True:
            try:
                data = store.read(f"{_ROWS}/{len(state.tasks):06d}.safetensors")
            except StoreKeyError:
                return state
            if not state._append(data):
                return state

    @classmethod
    def _snapshot(cls, store: Store, attempts: int = 3) -> GramState:
        record = records.find(store, PREFIX)
        if record is None:
            return cls()
        ((name, info),) = record["files"].items()
        try:
            data = store.read(f"{PREFIX}/{name}")
        except StoreKeyError:  # replaced since the record was read
            return cls._snapshot(store, attempts - 1) if attempts else cls()
        if not records.FileInfo.from_json(info).is_of(data):
            return cls()  # damaged: the vectors are still there, and will be added again
        tasks, metrics = list(record["metrics"]["tasks"]), record["metrics"]
        return cls(
            tasks, dict(record["parents"]), load(data)["gram"], list(metrics["history"]), len(tasks)
        )

    def _append(self, data: bytes) -> bool:
        """Add a row file's vectors; False where it belongs to others or is damaged: those will be
        added again.
        """
        length = int.from_bytes(data[:8], "little")
        try:
            info = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["raytvb"])
            rows = load(data)["rows"]
            if (
                info["chain"] != self.chain
                or info["sha256"] != _checksum(info, rows)
                or not info["vectors"]
            ):
                return False
        except (ValueError, KeyError, TypeError, SafetensorError):
            return False
        self.extend([(t, c) for t, c in info["vectors"]], rows)
        self.history += info["history"]
        return True


class GramWriter:
    """The right to write the Gram matrix of a store, until another writer is made."""

    def __init__(self, store: Store) -> None:
        """Takes the right over."""
        self._store, self._token = store, uuid.uuid4().hex
        before = store.read_json(_OWNER)["generation"] if store.exists(_OWNER) else 0
        store.write_json(_OWNER, {"generation": before + 1, "token": self._token})

    def check(self) -> None:
        """Raise UserError where another writer has been made since."""
        if self._store.read_json(_OWNER)["token"] != self._token:
            raise UserError(
                f"another run works on {self._store.url} and has taken over its Gram matrix: let it "
                f"finish, or stop it and run this again"
            )

    def append(
        self,
        state: GramState,
        known: Sequence[tuple[str, str]],
        rows: Tensor,
        history: Sequence[dict[str, Any]],
    ) -> None:
        """Extend the state by vectors and store that, as rows or as a snapshot."""
        self.check()
        info = {"chain": state.chain, "vectors": [list(k) for k in known], "history": list(history)}
        info["sha256"] = _checksum(info, rows)
        key = f"{_ROWS}/{len(state.tasks):06d}.safetensors"
        self._store.write(
            key, save({"rows": rows.contiguous()}, metadata={"raytvb": json.dumps(info)})
        )
        state.extend(known, rows)
        state.history += history
        if len(state.tasks) - state.snapshot >= max(16, state.snapshot // 4):
            self.save(state)

    def save(self, state: GramState) -> None:
        """Store a snapshot, and delete what it replaces."""
        self.check()
        count, old = len(state.tasks), self._store.keys(PREFIX)
        name = f"{count:06d}-{state.chain[:8]}.safetensors"
        records.commit(
            self._store,
            PREFIX,
            identity={},
            parents=state.checksums,
            metrics={"tasks": state.tasks, "history": state.history},
            files={name: save({"gram": state.gram.contiguous()})},
        )
        state.snapshot = count
        kept = (_OWNER, f"{PREFIX}/{name}", f"{PREFIX}/{records.RECORD}")
        for key in old:
            if key not in kept:
                self._store.delete(key)
