"""The ways to add tasks that a search compares.

A candidate is a set of stored vectors V (task vectors, or the vectors of a basis) and a coefficient
table A with a column for each task: task t is represented by V A[:, t], and a subset of the tasks
is added as the sum of its columns.

    zero-shot           nothing is added
    full                the task vectors, A = I
    <method>-m<M>       the M vectors of a basis, A = W: reconstruct each task, then add
    ...-online          the same, of a basis that followed the tasks one by one
    ...-<merge method>  reconstruct each task, then merge by another method of the literature
                        (also full-<merge method>)
    ...-sum             the plain sum of the M vectors of a convex basis (the authors' merge);
                        it adds all tasks and no other subset
    random-own-m<M>     M random tasks; a task outside of them contributes nothing
    random-lstsq-m<M>   M random tasks; every task is its least-squares combination of them

How this room works: `candidates` lists what is compared, `additions` turns a candidate into merged
models and counts their correct answers, `size_class` and `trial` choose its coefficients round by
round, `rounds` reads the results back from the store, and `choice` chooses among them. The values
that these hand to each other are in `results`.
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
from raytvb.experiment.metrics import BasisMetrics
from raytvb.experiment.stored import (
    basis_vector_set,
    load_coefficients,
    load_gram,
    stored_basis,
    vector_set,
)
from raytvb.maths.basis_fit import fit_basis
from raytvb.maths.merge_registry import MERGE_METHODS
from raytvb.maths.mixes import length_ratios
from raytvb.search.merged_vectors import method_direction
from raytvb.storage import records
from raytvb.storage.gram_state import GramState
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreKeyError
from raytvb.storage.vector_set import Coordinates

Kind = Literal["zero-shot", "full", "decoded", "basis-sum", "random-own", "random-lstsq"]
"""What stands for a task: nothing, its vector, what a basis decodes; `basis-sum`: the sum of the
basis vectors stands for all tasks together."""

ADDITION = "sum"
"""The merge method that adds the tasks' vectors (task arithmetic)."""


@dataclass(frozen=True)
class Candidate:
    """One way to add tasks."""

    name: str
    """In the store and in every report."""
    kind: Kind
    spec: BasisSpec | None = None
    """The basis, or the random subset of the tasks; None for the full vectors and for none."""
    table: tuple[tuple[float, ...], ...] | None = None
    """The coefficient table (T, T) as nested tuples, if no stored file has it."""
    merge_method: str = ADDITION
    """How the tasks' vectors become one; a merge method of `maths.merge_registry`."""

    @classmethod
    def decoded(cls, spec: BasisSpec) -> Candidate:
        """The tasks as a basis decodes them, added."""
        return cls(spec.name, "decoded", spec)

    @classmethod
    def basis_sum(cls, spec: BasisSpec) -> Candidate:
        """The plain sum of the vectors of a basis."""
        return cls(f"{spec.name}-sum", "basis-sum", spec)

    @property
    def method(self) -> str:
        """Basis method; the kind where there is no basis."""
        return self.kind if self.spec is None else self.spec.method

    @property
    def size(self) -> int:
        """Number M of basis vectors; 0 where there is no basis."""
        return 0 if self.spec is None else self.spec.size

    @property
    def online(self) -> bool:
        """Its basis followed the tasks one by one."""
        return self.spec is not None and self.spec.online

    @property
    def adds(self) -> bool:
        """The tasks' vectors are added, not merged by another method."""
        return self.merge_method == ADDITION

    @property
    def uses_stored_basis(self) -> bool:
        """Its vectors are those of a basis in the store."""
        return self.kind in ("decoded", "basis-sum")

    @property
    def basis(self) -> str:
        """Name of its basis in the store. Raises ValueError if it has none."""
        if self.spec is None:
            raise ValueError(f"{self.name} has no basis")
        return self.spec.name

    @property
    def is_random(self) -> bool:
        """A random subset of the tasks: a baseline. (A basis may also have the basis method
        `random-subset`; it is none.)
        """
        return self.kind in ("random-own", "random-lstsq")

    @property
    def is_basis(self) -> bool:
        """A basis whose tasks are decoded and added: the search chooses among these."""
        return self.kind == "decoded" and self.adds

    @property
    def has_lengths(self) -> bool:
        """Decoded vectors, which can be given the lengths of the task vectors."""
        return self.is_basis

    @property
    def has_weights(self) -> bool:
        """Its addition of all tasks can have a coefficient for each task or stored vector."""
        return self.kind in ("full", "decoded") and self.adds

    @property
    def group(self) -> str | None:
        """The candidates that it competes with: bases of one size, which have as many bytes. The
        poorer ones of a group stop before the last round. None: it competes with no other.
        """
        if not self.is_basis:
            return None
        return f"m{self.size}-online" if self.online else f"m{self.size}"

    @property
    def offline(self) -> Candidate:
        """The basis of the same method and size, fitted to all vectors at once."""
        return Candidate.decoded(BasisSpec(self.method, self.size))

    def open(self, experiment: Experiment) -> tuple[Coordinates, Tensor]:
        """Its F stored vectors and the coefficient table (F, T), float64."""
        url, tasks = experiment.store, experiment.task_names
        if self.kind == "decoded":
            return stored_basis(url, self.basis), load_coefficients(Store(url), self.basis)[1]
        if self.kind == "basis-sum":
            basis = stored_basis(url, self.basis)
            # All T tasks are added, always: 1/T each counts every basis vector once.
            shape = (basis.size, len(tasks))
            return basis, torch.full(shape, 1.0 / len(tasks), dtype=torch.float64)
        if self.table is not None:
            return basis_vector_set(experiment), torch.tensor(self.table, dtype=torch.float64)
        return vector_set(url, tasks), torch.eye(len(tasks), dtype=torch.float64)

    def ratios(self, experiment: Experiment) -> Tensor:
        """Length of each task vector over that of its decoded one: (T,) float64, see
        `maths.mixes.length_ratios`.
        """
        store = Store(experiment.store)
        B, W = load_coefficients(store, self.basis)
        gram = GramState.read(store).ordered(experiment.task_names)
        return length_ratios(gram, B @ W)

    def directions(
        self, vectors: Coordinates, table: Tensor, subsets: Sequence[Sequence[int]], seed: int
    ) -> Iterator[Tensor | None]:
        """What each subset of tasks adds up to, float32, one at a time (see `Evaluator.merge`).

        Args:
            vectors: the F stored vectors, as `open` gives them.
            table: (F, T) float64.
            subsets: positions of tasks.
            seed: of merge methods that draw.
        """
        if self.kind == "zero-shot":
            for _ in subsets:
                yield None
        elif self.adds:
            sums = [table[:, list(subset)].sum(dim=1) for subset in subsets]
            yield from vectors.combinations(torch.stack(sums, dim=1))
        else:
            for subset in subsets:
                columns = table[:, list(subset)]
                yield method_direction(vectors, columns, self.merge_method, seed=seed)

    def addends(self, count: int) -> int:
        """Number of vectors that are summed when `count` tasks are added; the best coefficient is
        near one over it.
        """
        if self.kind == "basis-sum":
            return self.size
        return 1 if MERGE_METHODS.lookup(self.merge_method).coefficient == "one" else count

    def subsets(
        self, subsets: Mapping[int, Sequence[tuple[int, ...]]]
    ) -> dict[int, Sequence[tuple[int, ...]]]:
        """The subsets, by size, that it can add: all; for a plain sum only the full set."""
        if self.kind != "basis-sum":
            return dict(subsets)
        largest = max(subsets)
        return {largest: subsets[largest]}


FULL = Candidate("full", "full")

ZERO_SHOT = Candidate("zero-shot", "zero-shot")


def basis_candidates(experiment: Experiment) -> list[Candidate]:
    """A candidate for each basis of the experiment: its tasks decoded and added."""
    return [Candidate.decoded(spec) for spec in basis_specs(experiment)]


def merge_candidates(experiment: Experiment) -> list[Candidate]:
    """The other merge methods that the experiment names, each on the full vectors and on what each
    basis decodes.
    """
    candidates: list[Candidate] = []
    for method in experiment.search.merges:
        for adding in (FULL, *basis_candidates(experiment)):
            name = f"{adding.name}-{method}"
            candidates.append(replace(adding, name=name, merge_method=method))
    return candidates


def sum_candidates(store: Store, experiment: Experiment) -> list[Candidate]:
    """The plain sums of the bases with convex B. Raises StoreKeyError if a basis is missing."""
    candidates: list[Candidate] = []
    for spec in basis_specs(experiment):
        if spec.online:
            continue
        prefix = basis_prefix(spec.name)
        record = records.read_record(store, f"{prefix}/{records.RECORD}")
        if record.metrics_as(BasisMetrics, store.where(prefix)).convex:
            candidates.append(Candidate.basis_sum(spec))
    return candidates


def random_candidates(experiment: Experiment, gram: Tensor) -> list[Candidate]:
    """Baselines at every size: seeded random subsets of the tasks, by themselves and with
    least-squares coefficients.

    gram: (T, T) float64. There are `search.random_subsets` draws of each size; the first has no
    number in its name, the others end in `-2`, `-3` and so on.
    """
    candidates: list[Candidate] = []
    for size in sizes_of(experiment):
        draws = experiment.search.random_subsets if size < len(experiment.tasks) else 1
        for draw in range(draws):
            candidates += _random_pair(gram, size, draw, experiment.seed)
    return candidates


def _random_pair(gram: Tensor, size: int, draw: int, seed: int) -> list[Candidate]:
    """Both baselines on one random subset of the tasks."""
    generator = torch.Generator().manual_seed(seed + draw)
    with warnings.catch_warnings():
        # A warning of an exact basis is given when bases are written.
        warnings.simplefilter("ignore", UserWarning)
        fit = fit_basis(gram, size, method="random-subset", generator=generator)
    ending = f"m{size}" if draw == 0 else f"m{size}-{draw + 1}"
    spec = BasisSpec("random-subset", size)
    is_drawn = fit.B.sum(dim=1) > 0
    own = Candidate(
        f"random-own-{ending}", "random-own", spec, _rows(torch.diag(is_drawn.double()))
    )
    lstsq = Candidate(f"random-lstsq-{ending}", "random-lstsq", spec, _rows(fit.B @ fit.W))
    return [own, lstsq]


def _rows(table: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, table.tolist()))


def all_candidates(store: Store, experiment: Experiment) -> list[Candidate]:
    """Everything that is searched. Raises UserError that names the bases that are missing."""
    gram = load_gram(store, experiment)
    missing: list[str] = []
    for spec in basis_specs(experiment):
        if records.find(store, basis_prefix(spec.name)) is None:
            missing.append(spec.name)
    if gram is None or missing:
        names = ", ".join(missing) or "no Gram matrix"
        raise UserError(f"bases are missing ({names}): run `raytvb basis` first")
    return [
        ZERO_SHOT,
        FULL,
        *basis_candidates(experiment),
        *sum_candidates(store, experiment),
        *random_candidates(experiment, gram),
        *merge_candidates(experiment),
    ]


def _vector_bytes(store: Store, experiment: Experiment) -> int:
    """Bytes of all task vectors, from one listing. Raises StoreKeyError where one is missing."""
    sizes = store.sizes("vectors")
    total = 0
    for task in experiment.task_names:
        key = vector_key(task)
        if key not in sizes:
            raise StoreKeyError(f"no such key: {store.where(key)}")
        total += sizes[key]
    return total


def candidate_bytes(
    store: Store, experiment: Experiment, candidates: Sequence[Candidate]
) -> dict[str, int]:
    """Stored bytes by candidate: its basis with the coefficient tables, or the task vectors that it
    needs; without masks.
    """
    vectors = _vector_bytes(store, experiment)
    bases: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for candidate in candidates:
        match candidate.kind:
            case "zero-shot":
                sizes[candidate.name] = 0
            case "full":
                sizes[candidate.name] = vectors
            case "decoded" | "basis-sum":
                if candidate.basis not in bases:
                    record = records.find(store, basis_prefix(candidate.basis))
                    bases[candidate.basis] = 0 if record is None else record.size
                sizes[candidate.name] = bases[candidate.basis]
            case "random-own" | "random-lstsq":
                sizes[candidate.name] = vectors * candidate.size // len(experiment.tasks)
    return sizes
