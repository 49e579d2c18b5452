"""The stream from task vectors to bases: takes each vector as it commits, keeps the exact Gram matrix and a fit of it.

A plain class; `remote` wraps it as a Ray actor. Its state is in the store (the Gram matrix and which vector, by
checksum, each row belongs to), so a restarted actor goes on where it was and a repeated call changes nothing.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from raytvb import artifacts, records
from raytvb.basis import BasisFit, fit_basis
from raytvb.candidates import basis_candidates, sizes_of
from raytvb.config import Experiment
from raytvb.store import Store
from raytvb.vectors import VectorSet, gram_row, write_combinations
from raytvb.workers import worker_setup

GRAM_FILE = "gram.safetensors"


def fit_candidate(experiment: Experiment, gram: Tensor, method: str, size: int) -> BasisFit:
    """The fit behind a stored basis; its seed is the experiment's."""
    generator = torch.Generator().manual_seed(experiment.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "basis size")  # M = T was asked for, or there is one task
        return fit_basis(gram, size, method=method, generator=generator)


def load_gram(store: Store, experiment: Experiment) -> Tensor | None:
    """The stored Gram matrix (T, T) in the order of the tasks, or None where a task's row is missing."""
    record = records.find(store, artifacts.GRAM)
    if record is None or set(record["metrics"]["tasks"]) != set(experiment.task_names):
        return None
    order = [record["metrics"]["tasks"].index(t) for t in experiment.task_names]
    return load(store.read(f"{artifacts.GRAM}/{GRAM_FILE}"))["gram"][order][:, order]


class BasisBuilder:
    """Streams the vectors of one experiment into its Gram matrix, and writes the bases.

    Memory is a few blocks of coordinates and T x T numbers. Where the store is not local, a copy of every vector file
    is kept in the temporary folder (T * density * D * 4 bytes), so each is downloaded once.
    """

    def __init__(self, experiment: Experiment) -> None:
        """Restores what an earlier builder knew."""
        worker_setup()
        self._experiment, self._store = experiment, Store(experiment.store)
        self._tasks: list[str] = []
        self._checksums: dict[str, str] = {}
        self._gram = torch.zeros(0, 0, dtype=torch.float64)
        self._history: list[dict[str, Any]] = []
        self._restore()

    def _restore(self) -> None:
        record = records.find(self._store, artifacts.GRAM)
        if record is None:
            return
        data = self._store.read(f"{artifacts.GRAM}/{GRAM_FILE}")
        if hashlib.sha256(data).hexdigest() != record["files"][GRAM_FILE]["sha256"]:
            return  # killed between data and record: the vectors are still there and will be added again
        self._tasks = list(record["metrics"]["tasks"])
        self._history = list(record["metrics"]["history"])
        self._checksums, self._gram = dict(record["parents"]), load(data)["gram"]

    def add(self, task: str) -> dict[str, Any]:
        """Take in the committed vector of a task: read it once, extend the Gram matrix, refit, save the state.

        Returns the number of vectors so far and the relative error of the present fits. Idempotent; a vector that was
        made again replaces its old row. Raises VectorError for a damaged file or one that does not belong.
        """
        record = records.find(self._store, artifacts.vector_prefix(task))
        if record is None:
            raise FileNotFoundError(f"{artifacts.vector_key(task)} has not been committed")
        checksum = record["files"]["vector.safetensors"]["sha256"]
        if self._checksums.get(task) != checksum:
            self._forget(task)
            names = [*self._tasks, task]
            vectors = artifacts.vector_set(self._experiment.store, names)
            self._check(task, vectors, checksum)
            row = gram_row(vectors, len(names) - 1, range(len(names)))
            self._extend(task, checksum, row)
            self._history.append({"task": task, "vectors": len(self._tasks), "relative_error": self._errors()})
            self._save()
        return self.status()

    def _check(self, task: str, vectors: VectorSet, checksum: str) -> None:
        file = vectors.files[-1]
        if hashlib.sha256(file.store.read(file.key)).hexdigest() != checksum:
            raise ValueError(f"{file.where}: the bytes differ from those recorded; delete vectors/{task} and run again")

    def _forget(self, task: str) -> None:
        if task in self._tasks:
            keep = [i for i, t in enumerate(self._tasks) if t != task]
            self._gram, self._tasks = self._gram[keep][:, keep], [self._tasks[i] for i in keep]
            self._checksums.pop(task)

    def _extend(self, task: str, checksum: str, row: Tensor) -> None:
        count = len(self._tasks)
        gram = torch.zeros(count + 1, count + 1, dtype=torch.float64)
        gram[:count, :count] = self._gram
        gram[count, :], gram[:, count] = row, row
        self._gram = gram
        self._tasks.append(task)
        self._checksums[task] = checksum

    def _errors(self) -> dict[str, float]:
        """Relative error of the first method's fit at every size that is smaller than the number of vectors."""
        method, count = self._experiment.basis.method[0], len(self._tasks)
        return {str(m): fit_candidate(self._experiment, self._gram, method, m).loss
                for m in sizes_of(self._experiment) if m < count}

    def _save(self) -> None:
        metrics = {"tasks": self._tasks, "history": self._history}
        identity = {"tasks": sorted(self._experiment.task_names)}
        records.commit(self._store, artifacts.GRAM, identity=identity, parents=self._checksums, metrics=metrics,
                       files={GRAM_FILE: save({"gram": self._gram})})

    def status(self) -> dict[str, Any]:
        """Number of vectors taken in, and the relative error of the latest fits by size."""
        latest = self._history[-1]["relative_error"] if self._history else {}
        return {"vectors": len(self._tasks), "relative_error": latest}

    def gram(self) -> Tensor:
        """The Gram matrix (T, T) float64 in the order of the experiment's tasks, once all are there."""
        missing = [t for t in self._experiment.task_names if t not in self._tasks]
        if missing:
            raise ValueError(f"vectors not taken in yet: {', '.join(missing)}")
        order = [self._tasks.index(t) for t in self._experiment.task_names]
        return self._gram[order][:, order]

    def write_bases(self) -> list[str]:
        """Write every basis that has no record, all in one pass over the vectors; returns the names written."""
        experiment, gram = self._experiment, self.gram()
        missing = [c for c in basis_candidates(experiment) if records.find(
            self._store, artifacts.basis_prefix(c.method, c.size),
            artifacts.basis_identity(experiment, c.method, c.size)) is None]
        if not missing:
            return []
        fits = {c.name: fit_candidate(experiment, gram, c.method, c.size) for c in missing}
        vectors = artifacts.vector_set(experiment.store, experiment.task_names)
        keys = {c.name: artifacts.basis_keys(c.method, c.size) for c in missing}
        written = write_combinations(vectors, [(fits[n].B, keys[n]) for n in fits], self._store)
        for c in missing:
            fit, prefix = fits[c.name], artifacts.basis_prefix(c.method, c.size)
            # JSON has no infinity, which is what the condition number of dependent columns is.
            condition = fit.condition if math.isfinite(fit.condition) else None
            metrics = {"relative_error": fit.loss, "floor": fit.floor, "condition": condition,
                       "convex": fit.convex, "tasks": list(experiment.task_names)}
            files = {k.removeprefix(prefix + "/"): written[k] for k in keys[c.name]}
            records.commit(self._store, prefix, identity=artifacts.basis_identity(experiment, c.method, c.size),
                           files={"coefficients.safetensors": artifacts.write_coefficients(fit)}, written=files,
                           parents={f"vectors/{t}": s for t, s in sorted(self._checksums.items())}, metrics=metrics)
        return [c.name for c in missing]
