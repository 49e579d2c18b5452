"""What a search compares: ways to add tasks, each a table of coefficients over a set of stored vectors.

The addition of the tasks in a set A is the direction  sum_f files[f] * sum_{t in A} table[f, t]:

    full            files are the T task vectors, table = I
    <method>-m<M>   files are the M basis vectors, table = W ("decoded": reconstruct each task, then add)
    ...-online      the same, of a basis that followed the tasks one by one
    ...-sum         files are the M basis vectors, one merge only: their plain sum (convex B; the authors')
    random-own      M random tasks: a task outside of them contributes nothing
    random-lstsq    M random tasks: every task is its least-squares combination of them
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raytvb import artifacts, records
from raytvb.basis import fit_basis
from raytvb.config import Experiment, half
from raytvb.online import ONLINE_METHODS
from raytvb.store import Store
from raytvb.vectors import Coordinates

Kind = Literal["full", "decoded", "sum", "random-own", "random-lstsq"]


@dataclass(frozen=True)
class Candidate:
    """One way to add tasks. `table` (M, T), float64 as nested tuples, is given where no stored file has it."""

    name: str
    kind: Kind
    method: str
    size: int
    table: tuple[tuple[float, ...], ...] | None = None
    online: bool = False

    def open(self, experiment: Experiment) -> tuple[Coordinates, Tensor]:
        """The vectors to combine and the coefficient table (files, T), float64."""
        url, tasks = experiment.store, experiment.task_names
        if self.kind in ("decoded", "sum"):
            basis = artifacts.stored_basis(url, self.basis)
            if self.kind == "decoded":
                return basis, artifacts.load_coefficients(Store(url), self.basis)[1]
            # A subset is always the full set here: spread 1 over its tasks so that each basis vector counts once.
            return basis, torch.full((basis.size, len(tasks)), 1.0 / len(tasks), dtype=torch.float64)
        vectors = artifacts.vector_set(url, tasks)
        if self.table is None:
            return vectors, torch.eye(len(tasks), dtype=torch.float64)
        return vectors, torch.tensor(self.table, dtype=torch.float64)

    @property
    def offline(self) -> Candidate:
        """The basis of the same method and size that is fitted to all vectors at once."""
        return Candidate(f"{self.method}-m{self.size}", "decoded", self.method, self.size)

    @property
    def basis(self) -> str:
        """Name of the stored basis behind it."""
        return self.name.removesuffix("-sum")

    def addends(self, count: int) -> int:
        """Vectors that are summed when `count` tasks are added: the best coefficient is near one over this."""
        return self.size if self.kind == "sum" else count

    def subsets(self, subsets: Mapping[int, Sequence[tuple[int, ...]]]) -> dict[int, Sequence[tuple[int, ...]]]:
        """The subsets this candidate can add: all, or for a plain sum of the basis vectors the full set alone."""
        largest = max(subsets)
        return {largest: subsets[largest]} if self.kind == "sum" else dict(subsets)


def sizes_of(experiment: Experiment) -> list[int]:
    """Basis sizes that are built: those asked for, and T/2, at which every method is reported."""
    return sorted({*experiment.search.sizes, half(len(experiment.tasks))})


def basis_candidates(experiment: Experiment) -> list[Candidate]:
    """Every method at every size, decoded; and, where asked for, those that an online basis has too."""
    asked = [(m, s) for m in experiment.basis.method for s in sizes_of(experiment)]
    found = [Candidate(f"{method}-m{size}", "decoded", method, size) for method, size in asked]
    if experiment.basis.online:
        found += [Candidate(f"{method}-m{size}-online", "decoded", method, size, online=True)
                  for method, size in asked if method in ONLINE_METHODS]
    return found


def sum_candidates(experiment: Experiment) -> list[Candidate]:
    """The plain sums of the stored bases whose B is convex. Raises FileNotFoundError where one is not there."""
    store = Store(experiment.store)
    offline = [c for c in basis_candidates(experiment) if not c.online]
    return [Candidate(f"{c.name}-sum", "sum", c.method, c.size) for c in offline
            if store.read_json(f"{artifacts.basis_prefix(c.name)}/{records.RECORD}")["metrics"]["convex"]]


def random_candidates(experiment: Experiment, gram: Tensor) -> list[Candidate]:
    """Baselines of size T/2: a seeded random subset of the tasks, by itself and with least-squares coefficients."""
    size = half(len(experiment.tasks))
    generator = torch.Generator().manual_seed(experiment.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a basis that is exact: said when bases are written
        fit = fit_basis(gram, size, method="random-subset", generator=generator)
    own = torch.diag((fit.B.sum(dim=1) > 0).double())
    tables: list[tuple[Kind, Tensor]] = [("random-own", own), ("random-lstsq", fit.B @ fit.W)]
    return [Candidate(f"{kind}-m{size}", kind, "random-subset", size, tuple(tuple(r) for r in table.tolist()))
            for kind, table in tables]
