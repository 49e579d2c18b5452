"""The stream from task vectors to bases: takes each vector as it commits, keeps the exact Gram
matrix and fits of it.

A plain class; `remote` wraps it as a Ray actor. Its state is in the store (see `gram_state`), so a
restarted actor goes on where it was, a repeated call changes nothing, and of two actors only the
later one writes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raytvb.bases.online import OnlineBasis
from raytvb.bases.shards import CoordinateShard, Shards, write_bases
from raytvb.experiment.basis_specs import BasisSpec, basis_specs, sizes_of
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import basis_identity
from raytvb.experiment.layout import basis_prefix, basis_vector_key, basis_vector_prefix
from raytvb.experiment.stored import basis_vector_record, write_coefficients
from raytvb.maths.basis_fit import BasisFit, fit_bases, fit_basis, relative_loss, task_errors
from raytvb.maths.gram import grown
from raytvb.models.process import worker_setup
from raytvb.storage import records
from raytvb.storage.gram_state import GramState, GramWriter
from raytvb.storage.records import FileInfo
from raytvb.storage.store import Store
from raytvb.storage.vectors import VectorFile


class BasisBuilder:
    """Streams the vectors of one experiment into its Gram matrix, and writes the bases.

    The shards do what is D-sized; here are T x T numbers only.
    """

    def __init__(self, experiment: Experiment, shards: Shards | None = None) -> None:
        """Reads what the store knows; with the first change it takes the Gram matrix over.

        shards: default, one in this process.
        """
        worker_setup()
        self._experiment, self._store = experiment, Store(experiment.store)
        self._shards = shards if shards is not None else CoordinateShard(experiment)
        self._state = GramState.read(self._store)
        self._claimed: GramWriter | None = None
        self._online = [
            OnlineBasis(experiment, self._store, self._shards, c)
            for c in basis_specs(experiment)
            if c.online
        ]

    @property
    def _writer(self) -> GramWriter:
        """The right to write, taken at first use; from then on a builder that had it before cannot
        write.
        """
        if self._claimed is None:
            self._claimed = GramWriter(self._store)
            self._state = GramState.read(self._store)  # as the one before left it
        return self._claimed

    # Taking vectors in ----------------------------------------------------------------------------

    def add(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Take in the committed vectors of tasks: each is read once, the Gram matrix extended and
        saved.

        Idempotent; a vector that was made again replaces its old row. A vector that cannot be used
        is left out, and its reason told; the rest goes on. Returns `status()` with `failed` {task:
        reason}.
        """
        failed, committed = dict[str, str](), dict[str, str]()
        for task in dict.fromkeys(tasks):
            record = basis_vector_record(self._store, self._experiment, task)
            if record is None:
                failed[task] = f"{self._store.where(self._key(task))} has not been committed"
            else:
                committed[task] = record["files"]["vector.safetensors"]["sha256"]
        if any(self._state.checksums.get(task) != checksum for task, checksum in committed.items()):
            self._writer.check()
        new = [k for k in committed.items() if self._state.checksums.get(k[0]) != k[1]]
        replaced = [task for task, _ in new if task in self._state.checksums]
        if replaced:
            self._state.forget(replaced)
            self._writer.save(self._state)
        if new:
            failed |= self._shards.fetch(new)
            new = [k for k in new if k[0] not in failed]
            failed |= self._extend(new) if new else {}
            for basis in self._online:
                basis.follow(self._state.checksums)
        way_out = "; delete its folder in the store and run again to make it anew"
        return self.status() | {
            "failed": {
                t: r if "delete the folder" in r or t not in committed else r + way_out
                for t, r in failed.items()
            }
        }

    def _extend(self, new: list[tuple[str, str]]) -> dict[str, str]:
        """Rows of usable vectors; task to reason for those with values that are not finite."""
        rows = self._shards.rows([*self._state.known, *new], len(new)).sum(dim=0)
        before = len(self._state.tasks)
        bad = [i for i in range(len(new)) if not bool(torch.isfinite(rows[i, before + i]))]
        failed = {
            new[i][0]: str(VectorFile(self._store, self._key(new[i][0])).complain()) for i in bad
        }
        good = [i for i in range(len(new)) if i not in bad]
        if good:
            columns = [*range(before), *(before + i for i in good)]
            self._append([new[i] for i in good], rows[good][:, columns])
        return failed

    def _key(self, task: str) -> str:
        return basis_vector_key(self._experiment, task)

    def _append(self, known: list[tuple[str, str]], rows: Tensor) -> None:
        total = len(self._state.tasks) + len(known)
        last = self._state.history[-1]["vectors"] if self._state.history else 0
        history = []
        if total <= 64 or total >= 1.1 * last or total == len(self._experiment.tasks):
            history = [{"vectors": total, "floor": self._floors(grown(self._state.gram, rows))}]
        self._writer.append(self._state, known, rows, history)
        if total == len(self._experiment.tasks):
            self._writer.save(self._state)

    def _floors(self, gram: Tensor) -> dict[str, float]:
        """Least relative error of any basis, at each size that is smaller than the number of
        vectors.
        """
        values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
        return {
            str(m): float(values[m:].sum() / values.sum())
            for m in sizes_of(self._experiment)
            if m < len(gram) and values.sum() > 0
        }

    def missing(self, tasks: Sequence[str]) -> list[str]:
        """Those of the tasks that have not been taken in."""
        return [t for t in tasks if t not in self._state.checksums]

    # Answers, at any moment -----------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Number of vectors so far, the least error at each size, and the cache: where it is and
        its bytes.
        """
        latest = self._state.history[-1]["floor"] if self._state.history else {}
        kind, size = self._shards.cache()
        return {
            "vectors": len(self._state.tasks),
            "floor": latest,
            "cache": kind,
            "cache_bytes": size,
        }

    def tasks(self) -> list[str]:
        """The tasks so far in the order of their arrival: position t is row t of every matrix."""
        return list(self._state.tasks)

    def gram(self) -> Tensor:
        """The Gram matrix (T, T) float64 in the order of the experiment's tasks, once all are
        there.
        """
        return self._state.ordered(self._experiment.task_names)

    def fit(self, method: str, size: int) -> BasisFit:
        """The fit of `size` basis vectors to the vectors so far, in the order of `tasks()`.
        ValueError for none.
        """
        if not self._state.tasks:
            raise ValueError("no vectors have been taken in yet")
        return fit_basis(self._state.gram, size, method=method, generator=self._generator())

    def spectrum(self) -> Tensor:
        """Eigenvalues (T,) float64 of the Gram matrix so far, falling."""
        return torch.linalg.eigvalsh(self._state.gram).flip(0).clamp(min=0)

    def errors(self, method: str, size: int) -> dict[str, float]:
        """Relative squared error of each task so far, as `fit(method, size)` reconstructs it."""
        found = task_errors(self._state.gram, self.fit(method, size)).tolist()
        return dict(zip(self._state.tasks, found, strict=True))

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._experiment.seed)

    # Writing bases --------------------------------------------------------------------------------

    def write_bases(self) -> dict[str, Any]:
        """Write every basis that has no record, all in one pass over the vectors.

        Returns `written`, their names, and `notes`, what a user should know of them.
        """
        gram, experiment = self.gram(), self._experiment
        for basis in self._online:
            basis.follow(self._state.checksums)
        missing = [
            c
            for c in basis_specs(experiment)
            if records.find(
                self._store,
                basis_prefix(c.name),
                basis_identity(experiment, c),
            )
            is None
        ]
        if not missing:
            return {"written": [], "notes": []}
        self._writer.check()
        fits, notes = self._fits(gram, [c for c in missing if not c.online])
        known = [(t, self._state.checksums[t]) for t in experiment.task_names]
        outputs = {basis_prefix(n): fit.B for n, fit in fits.items()}
        files = write_bases(self._store, self._shards, outputs, known) if outputs else {}
        for c in missing:
            if not c.online:
                fit, written = fits[c.name], files[basis_prefix(c.name)]
                self._commit(
                    c,
                    gram,
                    fit.B,
                    fit.W,
                    written,
                    {"floor": fit.floor, "condition": fit.condition, "relative_error": fit.loss},
                )
        for basis, c in zip(
            self._online, (c for c in basis_specs(experiment) if c.online), strict=True
        ):
            if c in missing:
                state = basis.state
                self._commit(
                    c,
                    gram,
                    state.H,
                    state.W,
                    basis.written,
                    {
                        "relative_error": relative_loss(gram, state.H, state.W),
                        "error_bounds": basis.error_bounds(),
                        "floor": float(self._floors(gram).get(str(c.size), 0.0)),
                        "condition": None,
                    },
                )
        return {"written": [c.name for c in missing], "notes": notes}

    def _fits(
        self, gram: Tensor, specs: Sequence[BasisSpec]
    ) -> tuple[dict[str, BasisFit], list[str]]:
        """Fits by name, each method's sizes from one call, and what they warned of."""
        fits, notes = dict[str, BasisFit](), dict[str, None]()  # methods warn of the same things
        for method in dict.fromkeys(c.method for c in specs):
            chosen = [c for c in specs if c.method == method]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                found = fit_bases(
                    gram, [c.size for c in chosen], method=method, generator=self._generator()
                )
            fits |= {c.name: fit for c, fit in zip(chosen, found, strict=True)}
            notes |= {str(w.message): None for w in caught if issubclass(w.category, UserWarning)}
        return fits, list(notes)

    def _commit(
        self,
        spec: BasisSpec,
        gram: Tensor,
        B: Tensor,
        W: Tensor,
        written: dict[str, FileInfo],
        metrics: dict[str, Any],
    ) -> None:
        # JSON has no infinity, which is what the condition number of dependent columns is.
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in metrics.items()
        }
        convex = bool((B >= -1e-9).all()) and bool(((B.sum(0) - 1).abs() <= 1e-9).all())
        records.commit(
            self._store,
            basis_prefix(spec.name),
            written=written,
            identity=basis_identity(self._experiment, spec),
            files={"coefficients.safetensors": write_coefficients(B, W)},
            parents={
                basis_vector_prefix(self._experiment, t): s
                for t, s in sorted(self._state.checksums.items())
            },
            metrics={
                "convex": convex,
                "vectors": B.shape[1],
                "tasks": list(self._experiment.task_names),
                **finite,
            },
        )
