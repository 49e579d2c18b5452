"""An online basis in a store: M vectors that follow the tasks one by one, each task vector seen
once.

The small matrices are advanced by `online`; S is read and written here, block by block, by the
shards. After every refit the state is in the store: `online/<name>/` with W, H and bounds, and S in
a folder of its own, the last one being `basis/<name>/`. Tasks are taken in the order of the
experiment, however their fine-tunes end, so that the result does not depend on which is faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import load, save

from raytvb.bases.shards import Known, Shards, write_bases
from raytvb.experiment.basis_specs import BasisSpec
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import basis_identity
from raytvb.experiment.layout import basis_prefix, online_prefix, online_tables
from raytvb.maths import online_basis
from raytvb.storage import records
from raytvb.storage.records import FileInfo
from raytvb.storage.store import Store


class OnlineBasis:
    """One online basis of an experiment, restored from the store."""

    def __init__(
        self, experiment: Experiment, store: Store, shards: Shards, spec: BasisSpec
    ) -> None:
        """Goes on from what the store has. Raises UserError where that is of another experiment."""
        self._experiment, self._store, self._shards, self._spec = (
            experiment,
            store,
            shards,
            spec,
        )
        self._prefix = online_prefix(spec.name)
        self._identity = basis_identity(experiment, spec)
        self._restore(records.find(store, self._prefix, self._identity))

    def _restore(self, record: Mapping[str, Any] | None) -> None:
        """The state of a record, or that before the first task."""
        found = (
            {"tasks": [], "folder": None, "written": {}} if record is None else record["metrics"]
        )
        parents, files = ({}, {}) if record is None else (record["parents"], record["files"])
        self.known: list[tuple[str, str]] = [(task, parents[task]) for task in found["tasks"]]
        self.folder: str | None = found["folder"]
        self.written = {name: FileInfo.from_json(info) for name, info in found["written"].items()}
        self._files = {name: FileInfo.from_json(info) for name, info in files.items()}
        self.state = online_basis.start(self._spec.method, self._spec.size)
        if record is not None:
            tables = load(self._store.read(f"{self._prefix}/{online_tables(len(self.known))}"))
            self.state = online_basis.OnlineState(self._spec.method, self._spec.size, **tables)

    def follow(self, checksums: Mapping[str, str]) -> None:
        """Take in, in the order of the experiment, the tasks that are there (by name, with their
        vector's checksum).

        A vector that was made again after it had been taken in starts the basis anew, for it cannot
        be taken back; so does a basis whose files were deleted.
        """
        gone = any(not self._store.exists(f"{self.folder}/{name}") for name in self.written)
        if gone or any(checksums.get(task, checksum) != checksum for task, checksum in self.known):
            self._store.delete(self._prefix)
            self._store.delete(basis_prefix(self._spec.name))
            self._restore(None)
        order, buffer = self._experiment.task_names, self._experiment.basis.buffer
        while len(self.known) < len(order):
            rest = order[len(self.known) :]
            there = next((i for i, task in enumerate(rest) if task not in checksums), len(rest))
            if there < min(buffer, len(rest)):
                return
            self._step([(task, checksums[task]) for task in rest[:buffer]])

    def _step(self, new: Known) -> None:
        gram = self._shards.atoms_gram(self.folder, new).sum(dim=0)
        mix, state = online_basis.advance(self.state, gram)
        known, before = [*self.known, *new], self.folder
        last = len(known) == len(self._experiment.tasks)
        folder = basis_prefix(self._spec.name) if last else f"{self._prefix}/{len(known):06d}"
        written = write_bases(self._store, self._shards, {folder: mix}, new, before)[folder]
        looks = online_basis.arrivals(len(self._experiment.tasks), self._experiment.basis.buffer)
        kept = {online_tables(n) for n in looks}
        old = {n: i for n, i in self._files.items() if n in kept}
        inside = {} if last else {f"{len(known):06d}/{n}": i for n, i in written.items()}
        tables = {n: getattr(state, n).contiguous().clone() for n in ("W", "H", "error", "norm")}
        record = records.commit(
            self._store,
            self._prefix,
            identity=self._identity,
            parents=dict(known),
            written={**old, **inside},
            files={online_tables(len(known)): save(tables)},
            metrics={
                "tasks": [t for t, _ in known],
                "folder": folder,
                "written": {n: i.to_json() for n, i in written.items()},
            },
        )
        dropped = self._files.keys() - record["files"].keys()
        self._restore(record)
        for name in dropped:
            self._store.delete(f"{self._prefix}/{name}")

    def error_bounds(self) -> dict[str, float]:
        """Upper bound of the relative error (a norm, not squared) of each task taken in so far."""
        bounds: Sequence[float] = online_basis.relative_bounds(self.state).tolist()
        return {task: bound for (task, _), bound in zip(self.known, bounds, strict=True)}
