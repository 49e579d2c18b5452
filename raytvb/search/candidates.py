"""The ways to add tasks that a search compares.

A candidate is a list of stored vectors (task vectors, or the vectors of a basis) and a table A with
a column for each
task: task t is represented by V A[:, t], and a subset is added as the sum of its columns.

    zero-shot       nothing is added full            the task vectors, A = I <method>-m<M>   files
    are the M basis vectors, A = W: reconstruct each task, then add ...-online      the same, of a
    basis that followed the tasks one by one ...-<merge>     reconstruct each task, then merge by
    another method of the literature (also full-<merge>) ...-sum         files are the M basis
    vectors, one merge only: their plain sum (convex B; the authors') random-own      M random
    tasks: a task outside of them contributes nothing random-lstsq    M random tasks: every task is
    its least-squares combination of them
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from raytvb.errors import UserError
from raytvb.experiment.basis_specs import BasisSpec, basis_specs, sizes_of
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import basis_prefix, vector_key
from raytvb.experiment.stored import (
    basis_vector_set,
    load_coefficients,
    load_gram,
    stored_basis,
    vector_set,
)
from raytvb.maths.basis_fit import fit_basis
from raytvb.maths.merge_methods import UNSCALED
from raytvb.maths.mixes import length_ratios
from raytvb.search.directions import method_direction
from raytvb.storage import records
from raytvb.storage.gram_state import GramState
from raytvb.storage.store import Store
from raytvb.storage.vector_set import Coordinates

Kind = Literal["zero-shot", "full", "decoded", "sum", "random-own", "random-lstsq"]


@dataclass(frozen=True)
class Candidate:
    """One way to add tasks. `table` (T, T), float64 as nested tuples, is given where no stored file
    has it.
    """

    name: str
    kind: Kind
    method: str
    size: int
    table: tuple[tuple[float, ...], ...] | None = None
    online: bool = False
    merge: str = "sum"
    """How the tasks' vectors become one: a method of `methods.MERGE`."""

    def open(self, experiment: Experiment) -> tuple[Coordinates, Tensor]:
        """The vectors to combine and the coefficient table (files, T), float64."""
        url, tasks = experiment.store, experiment.task_names
        if self.kind in ("decoded", "sum"):
            basis = stored_basis(url, self.basis)
            if self.kind == "decoded":
                return basis, load_coefficients(Store(url), self.basis)[1]
            # A subset is always the full set here: spread 1 over its tasks so that each basis
            # vector counts once.
            return basis, torch.full(
                (basis.size, len(tasks)), 1.0 / len(tasks), dtype=torch.float64
            )
        if self.table is None:
            return vector_set(url, tasks), torch.eye(len(tasks), dtype=torch.float64)
        return basis_vector_set(experiment), torch.tensor(self.table, dtype=torch.float64)

    @property
    def has_lengths(self) -> bool:
        """Its tasks are decoded from a basis, and can be given the lengths of the task vectors
        (`length_ratios`).
        """
        return self.kind == "decoded" and self.merge == "sum"

    def ratios(self, experiment: Experiment) -> Tensor:
        """`mixes.length_ratios` (T,) float64 of what it decodes."""
        B, W = load_coefficients(Store(experiment.store), self.basis)
        return length_ratios(
            GramState.read(Store(experiment.store)).ordered(experiment.task_names), B @ W
        )

    def directions(
        self, vectors: Coordinates, table: Tensor, subsets: Sequence[Sequence[int]], seed: int
    ) -> Iterator[Tensor | None]:
        """What each subset of tasks adds up to (see `Evaluator.merge`), for the result of `open`;
        one at a time.
        """
        if self.kind == "zero-shot":
            yield from (None for _ in subsets)
        elif self.merge == "sum":
            yield from vectors.combinations(
                torch.stack([table[:, list(s)].sum(dim=1) for s in subsets], dim=1)
            )
        else:
            yield from (
                method_direction(vectors, table[:, list(s)], self.merge, seed=seed) for s in subsets
            )

    @property
    def offline(self) -> Candidate:
        """The basis of the same method and size that is fitted to all vectors at once."""
        name = BasisSpec(self.method, self.size).name
        return Candidate(name, "decoded", self.method, self.size)

    @property
    def basis(self) -> str:
        """Name of the stored basis behind it, where there is one."""
        return BasisSpec(self.method, self.size, self.online).name

    @property
    def is_basis(self) -> bool:
        """A basis whose tasks are decoded and added: what the search chooses from."""
        return self.kind == "decoded" and self.merge == "sum"

    @property
    def group(self) -> str | None:
        """Candidates of as many bytes, whose poorer ones need no more images; None: it goes through
        all of them.
        """
        return f"m{self.size}{'-online' if self.online else ''}" if self.is_basis else None

    def addends(self, count: int) -> int:
        """Vectors that are summed when `count` tasks are added: the best coefficient is near one
        over this.
        """
        return self.size if self.kind == "sum" else 1 if self.merge in UNSCALED else count

    def subsets(
        self, subsets: Mapping[int, Sequence[tuple[int, ...]]]
    ) -> dict[int, Sequence[tuple[int, ...]]]:
        """The subsets this candidate can add: all, or for a plain sum of the basis vectors the full
        set alone.
        """
        largest = max(subsets)
        return {largest: subsets[largest]} if self.kind == "sum" else dict(subsets)


FULL = Candidate("full", "full", "full", 0)


ZERO_SHOT = Candidate("zero-shot", "zero-shot", "zero-shot", 0)


def basis_candidates(experiment: Experiment) -> list[Candidate]:
    """A candidate for each basis of the experiment: its tasks decoded and added."""
    return [
        Candidate(spec.name, "decoded", spec.method, spec.size, online=spec.online)
        for spec in basis_specs(experiment)
    ]


def merge_candidates(experiment: Experiment) -> list[Candidate]:
    """The other merge methods that are asked for, on the full vectors and on what each basis
    reconstructs.
    """
    return [
        replace(c, name=f"{c.name}-{merge}", merge=merge)
        for merge in experiment.search.merges
        for c in (FULL, *basis_candidates(experiment))
    ]


def sum_candidates(experiment: Experiment) -> list[Candidate]:
    """The plain sums of the stored bases whose B is convex. Raises FileNotFoundError where one is
    not there.
    """
    store = Store(experiment.store)
    offline = [c for c in basis_candidates(experiment) if not c.online]
    return [
        Candidate(f"{c.name}-sum", "sum", c.method, c.size)
        for c in offline
        if store.read_json(f"{basis_prefix(c.name)}/{records.RECORD}")["metrics"]["convex"]
    ]


def random_candidates(experiment: Experiment, gram: Tensor) -> list[Candidate]:
    """Baselines at every size: seeded random subsets of the tasks, by themselves and with
    least-squares coefficients.

    Of `search.random_subsets` draws the first has no number in its name, the others have `-2`, `-3`
    and so on.
    """
    found = []
    for size in sizes_of(experiment):
        for draw in range(experiment.search.random_subsets if size < len(experiment.tasks) else 1):
            generator = torch.Generator().manual_seed(experiment.seed + draw)
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # of a basis that is exact: said when bases are written
                fit = fit_basis(gram, size, method="random-subset", generator=generator)
            own = torch.diag((fit.B.sum(dim=1) > 0).double())
            tables: list[tuple[Kind, Tensor]] = [
                ("random-own", own),
                ("random-lstsq", fit.B @ fit.W),
            ]
            found += [
                Candidate(
                    f"{kind}-m{size}{f'-{draw + 1}' if draw else ''}",
                    kind,
                    "random-subset",
                    size,
                    tuple(tuple(r) for r in table.tolist()),
                )
                for kind, table in tables
            ]
    return found


def all_candidates(store: Store, experiment: Experiment) -> list[Candidate]:
    """Everything that is searched. Raises UserError where the bases are not there yet."""
    gram = load_gram(store, experiment)
    missing = [
        c.name
        for c in basis_candidates(experiment)
        if records.find(store, basis_prefix(c.name)) is None
    ]
    if gram is None or missing:
        raise UserError(
            f"bases are missing ({', '.join(missing) or 'no Gram matrix'}): run `raytvb basis` first"
        )
    return [
        ZERO_SHOT,
        FULL,
        *basis_candidates(experiment),
        *sum_candidates(experiment),
        *random_candidates(experiment, gram),
        *merge_candidates(experiment),
    ]


def candidate_bytes(
    store: Store, experiment: Experiment, candidates: Sequence[Candidate]
) -> dict[str, int]:
    """Stored bytes of each candidate: its basis with the tables, or the task vectors it needs;
    without masks.
    """
    vectors = sum(store.size(vector_key(t)) for t in experiment.task_names)
    bases = {c.basis: 0 for c in candidates if c.kind in ("decoded", "sum")}
    for name in bases:
        record = records.find(store, basis_prefix(name))
        bases[name] = sum(f["size"] for f in record["files"].values()) if record is not None else 0
    return {
        c.name: bases[c.basis]
        if c.kind in ("decoded", "sum")
        else 0
        if c.kind == "zero-shot"
        else vectors
        if c.kind == "full"
        else vectors * c.size // len(experiment.tasks)
        for c in candidates
    }
