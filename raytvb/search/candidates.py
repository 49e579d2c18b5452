"""The ways to add tasks that a search compares.

A candidate is a set of stored vectors V (task vectors, or the vectors of a basis) and a coefficient
table A with a column for each task: task t is represented by V A[:, t], and a subset of the tasks
is added as the sum of its columns.

    zero-shot           nothing is added
    full                the task vectors, A = I
    <method>-m<M>       the M vectors of a basis, A = W: reconstruct each task, then add
    ...-online          the same, with a basis that was updated as the tasks arrived one by one
    ...-<merge method>  reconstruct each task, then merge by another method of the literature
                        (also full-<merge method>)
    ...-sum             the plain sum of the M vectors of a convex basis (the authors' merge);
                        it can add all tasks, but no smaller subset
    random-own-m<M>     M random tasks; every other task contributes nothing
    random-lstsq-m<M>   M random tasks; every task is its least-squares combination of them

How this folder works: `candidates` lists what is compared. `additions` turns a candidate into
merged models and counts their correct answers. `size_class` and `trial` choose its coefficients,
round by round. `rounds` reads the results back from the store, and `choice` chooses among them.
`results` has the types of the values that these modules hand to each other.
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
from raytvb.experiment.layout import basis_prefix, vector_prefix
from raytvb.experiment.metrics import BasisMetrics
from raytvb.experiment.present_versions import PresentVersions
from raytvb.experiment.stored import load_gram, vector_sizes
from raytvb.experiment.stored_vectors import vector_set
from raytvb.maths.basis_fit import fit_basis
from raytvb.maths.merge_registry import MERGE_METHODS
from raytvb.search.merged_vectors import method_direction
from raytvb.storage import records
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreKeyError
from raytvb.storage.vector_set import Coordinates
from raytvb.storage.vectors import VECTOR

Kind = Literal["zero-shot", "full", "decoded", "basis-sum", "random-own", "random-lstsq"]
"""What stands for a task: nothing (`zero-shot`), its vector (`full`), or what a basis or a random
subset makes of it. With `basis-sum`, the sum of the basis vectors stands for all tasks together."""

ADDITION = "sum"
"""Name of the merge method that adds the tasks' vectors (task arithmetic)."""


@dataclass(frozen=True)
class Candidate:
    """One way to add tasks."""

    name: str
    """Its name in the store and in every report."""
    kind: Kind
    spec: BasisSpec | None = None
    """The basis, or the random subset of the tasks; None for `full` and `zero-shot`."""
    table: tuple[tuple[float, ...], ...] | None = None
    """The coefficient table (T, T) as nested tuples, if no stored file has it."""
    merge_method: str = ADDITION
    """Merge method that makes one vector of the tasks' vectors (see `maths.merge_registry`)."""

    @classmethod
    def decoded(cls, spec: BasisSpec) -> Candidate:
        """The candidate that adds the tasks as a basis decodes them."""
        return cls(spec.name, "decoded", spec)

    @classmethod
    def basis_sum(cls, spec: BasisSpec) -> Candidate:
        """The candidate that is the plain sum of the vectors of a basis."""
        return cls(f"{spec.name}-sum", "basis-sum", spec)

    @property
    def method(self) -> str:
        """Basis method; the kind if there is no basis."""
        return self.kind if self.spec is None else self.spec.method

    @property
    def size(self) -> int:
        """Number M of basis vectors; 0 if there is no basis."""
        return 0 if self.spec is None else self.spec.size

    @property
    def online(self) -> bool:
        """Whether its basis was updated as the tasks arrived one by one."""
        return self.spec is not None and self.spec.online

    @property
    def adds(self) -> bool:
        """Whether the tasks' vectors are added, not merged by another method."""
        return self.merge_method == ADDITION

    @property
    def uses_stored_basis(self) -> bool:
        """Whether its vectors are those of a basis in the store."""
        return self.kind in ("decoded", "basis-sum")

    @property
    def basis(self) -> str:
        """Name of its basis in the store. Raises ValueError if it has none."""
        if self.spec is None:
            raise ValueError(f"{self.name} has no basis")
        return self.spec.name

    @property
    def is_random(self) -> bool:
        """Whether it is a baseline on a random subset of the tasks.

        A basis of the basis method `random-subset` is not such a baseline.
        """
        return self.kind in ("random-own", "random-lstsq")

    @property
    def is_basis(self) -> bool:
        """Whether it adds tasks that a basis decodes. The search chooses among these candidates."""
        return self.kind == "decoded" and self.adds

    @property
    def has_lengths(self) -> bool:
        """Whether its vectors are decoded, so that they can get the lengths of the task vectors."""
        return self.is_basis

    @property
    def has_weights(self) -> bool:
        """Whether adding all tasks can use a coefficient for each task or stored vector."""
        return self.kind in ("full", "decoded") and self.adds

    @property
    def group(self) -> str | None:
        """The name of the group of candidates that it competes with; None if it has no group.

        A group is the bases of one size, which take the same number of bytes. The poorer candidates
        of a group stop before the last round.
        """
        if not self.is_basis:
            return None
        return f"m{self.size}-online" if self.online else f"m{self.size}"

    @property
    def offline(self) -> Candidate:
        """The candidate of the same basis method and size, fitted to all vectors at once."""
        return Candidate.decoded(BasisSpec(self.method, self.size))

    def open(self, experiment: Experiment, present: PresentVersions) -> tuple[Coordinates, Tensor]:
        """Its F stored vectors and the coefficient table (F, T), float64.

        Raises UserError if they are no longer the present versions.
        """
        tasks = experiment.task_names
        if self.uses_stored_basis:
            version = present.basis(Store(experiment.store), self.basis)
            basis = version.vectors()
            if self.kind == "decoded":
                return basis, version.coefficients()[1]
            # A basis sum always adds all T tasks. Weights of 1/T count every basis vector once.
            shape = (basis.size, len(tasks))
            return basis, torch.full(shape, 1.0 / len(tasks), dtype=torch.float64)
        twins = self.table is not None
        vectors = vector_set(present.stored_vectors(experiment, twins=twins))
        if self.table is not None:
            return vectors, torch.tensor(self.table, dtype=torch.float64)
        return vectors, torch.eye(len(tasks), dtype=torch.float64)

    def ratios(self, experiment: Experiment, present: PresentVersions) -> Tensor:
        """The length of each task vector divided by that of its decoded vector: (T,) float64.

        See `maths.mixes.length_ratios`.
        """
        return present.basis(Store(experiment.store), self.basis).ratios()

    def directions(
        self, vectors: Coordinates, table: Tensor, subsets: Sequence[Sequence[int]], seed: int
    ) -> Iterator[Tensor | None]:
        """What each subset of tasks adds up to, float32, one at a time (see `Evaluator.merge`).

        Args:
            vectors: the F stored vectors, as `open` gives them.
            table: (F, T) float64.
            subsets: positions of tasks.
            seed: seed of merge methods that draw random numbers.
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
        """How many vectors are summed when `count` tasks are added.

        The best coefficient is near one over this number.
        """
        if self.kind == "basis-sum":
            return self.size
        return 1 if MERGE_METHODS.lookup(self.merge_method).coefficient == "one" else count

    def subsets(
        self, subsets: Mapping[int, Sequence[tuple[int, ...]]]
    ) -> dict[int, Sequence[tuple[int, ...]]]:
        """The subsets that it can add, by size. A basis sum can only add the full set."""
        if self.kind != "basis-sum":
            return dict(subsets)
        largest = max(subsets)
        return {largest: subsets[largest]}


FULL = Candidate("full", "full")

ZERO_SHOT = Candidate("zero-shot", "zero-shot")


def basis_candidates(experiment: Experiment) -> list[Candidate]:
    """A candidate for each basis of the experiment, which adds the tasks that the basis decodes."""
    return [Candidate.decoded(spec) for spec in basis_specs(experiment)]


def merge_candidates(experiment: Experiment) -> list[Candidate]:
    """The candidates of the other merge methods that the experiment names.

    Each method has one candidate on the full vectors, and one on the vectors that each basis
    decodes.
    """
    candidates: list[Candidate] = []
    for method in experiment.search.merges:
        for addition in (FULL, *basis_candidates(experiment)):
            name = f"{addition.name}-{method}"
            candidates.append(replace(addition, name=name, merge_method=method))
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
    """Baselines at every size, on seeded random subsets of the tasks.

    Every subset gives two baselines: the subset by itself, and with least-squares coefficients for
    all tasks. gram: (T, T) float64. There are `search.random_subsets` draws of each size. The name
    of the first has no number, the names of the others end in `-2`, `-3` and so on.
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
        # The stage `basis` has given the warning that a basis is exact.
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


def all_candidates(
    store: Store, experiment: Experiment, present: PresentVersions
) -> list[Candidate]:
    """All candidates of the search.

    Raises UserError that names the bases that are missing, or were made of other vectors.
    """
    gram = load_gram(store, experiment)
    missing = [spec.name for spec in basis_specs(experiment) if spec.name not in present.bases]
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
    """Bytes of all task vectors, from one listing. Raises StoreKeyError if one is missing."""
    sizes = vector_sizes(experiment, store.sizes("vectors"))
    for task in experiment.task_names:
        if task not in sizes:
            raise StoreKeyError(f"no such key: {store.where(vector_prefix(task))}/{VECTOR}")
    return sum(sizes.values())


def candidate_bytes(
    store: Store, experiment: Experiment, candidates: Sequence[Candidate]
) -> dict[str, int]:
    """The stored bytes of each candidate, without masks.

    They are those of its basis with the coefficient tables, or of the task vectors that it needs.
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
