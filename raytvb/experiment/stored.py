"""Opens the bases and tables in the store of an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor

from raytvb.errors import UserError
from raytvb.experiment.basis_specs import basis_specs
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import (
    BASES,
    COEFFICIENTS,
    HEAD,
    basis_prefix,
    head_prefix,
    mask_prefix,
    vector_prefix,
)
from raytvb.experiment.metrics import BasisMetrics
from raytvb.experiment.shared_masks import last_id
from raytvb.experiment.stored_vectors import basis_vectors_of, library
from raytvb.maths.mixes import length_ratios
from raytvb.storage import records
from raytvb.storage.basis_layout import tag_of
from raytvb.storage.damage import unreadable
from raytvb.storage.gram_state import GramState
from raytvb.storage.mirror import mirror
from raytvb.storage.records import Record
from raytvb.storage.replacing import tagged
from raytvb.storage.store import Store
from raytvb.storage.stored_basis import StoredBasis
from raytvb.storage.tensor_file import tensor_of, tensors_of
from raytvb.storage.vectors import vector_file


@dataclass(frozen=True)
class BasisVersion:
    """One version of a basis: everything is read as its record says.

    So a basis that is replaced meanwhile is never mixed with the new one. Its files are then
    deleted, and reading them ends in a DamagedError.
    """

    store: Store
    name: str
    record: Record

    @classmethod
    def find(cls, store: Store, name: str) -> BasisVersion | None:
        """The version that is in the store now; None if there is no such basis."""
        record = records.find(store, basis_prefix(name))
        return None if record is None else cls(store, name, record)

    @property
    def prefix(self) -> str:
        """Folder of the basis."""
        return basis_prefix(self.name)

    @property
    def metrics(self) -> BasisMetrics:
        """Metrics in its record. DamagedError: they are not those of a basis."""
        return self.record.metrics_as(BasisMetrics, self.store.where(self.prefix))

    @property
    def _table(self) -> str:
        return tagged(COEFFICIENTS, tag_of(self.record.files))

    @property
    def checksum(self) -> str:
        """sha256 of the coefficient table, which tells the version."""
        return self.record.file(self._table, self.store.where(self.prefix)).sha256

    def vectors(self) -> StoredBasis:
        """The vectors of the basis, opened through the process's mirror."""
        return mirror(self.store.url).basis(self.prefix, self.record.files)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """B (T, M) and W (M, T), float64. DamagedError: the table differs from the record."""
        tensors, where = self._tensors()
        B = tensor_of(tensors, "B", torch.float64, 2, where)
        W = tensor_of(tensors, "W", torch.float64, 2, where)
        if B.shape != W.T.shape:
            raise unreadable(where, f"B is {tuple(B.shape)}, and W is {tuple(W.shape)}")
        return B, W

    def _tensors(self) -> tuple[dict[str, Tensor], str]:
        where = self.store.where(f"{self.prefix}/{self._table}")
        data = records.read_file(self.store, self.prefix, self._table, self.record)
        return tensors_of(data, where), where

    def ratios(self) -> Tensor:
        """The length of each task vector divided by that of its decoded vector: (T,) float64.

        See `maths.mixes.length_ratios`. Tables of earlier formats have none. Then they are computed
        from the Gram matrix. Raises UserError if that is of other vectors than the basis.
        """
        tensors, where = self._tensors()
        if "ratios" in tensors:
            ratios = tensor_of(tensors, "ratios", torch.float64, 1, where)
            if len(ratios) != len(self.metrics.tasks):
                raise unreadable(where, f"ratios is {tuple(ratios.shape)}")
            return ratios
        B, W = self.coefficients()
        state, tasks = GramState.read(self.store), self.metrics.tasks
        made_of = {prefix.partition("/")[2]: sha for prefix, sha in self.record.parents.items()}
        if any(state.checksums.get(task) != made_of.get(task) for task in tasks):
            raise UserError(
                f"{self.store.where(self.prefix)} was made of other vectors than those that are "
                f"there now: run `raytvb run` to make it again"
            )
        return length_ratios(state.ordered(tasks), B @ W)


def existing_basis(store: Store, name: str) -> BasisVersion:
    """The version of a basis that is in the store now.

    Raises StoreKeyError if there is no such basis.
    """
    prefix = basis_prefix(name)
    return BasisVersion(store, name, records.read_record(store, records.record_key(prefix)))


def write_coefficients(B: Tensor, W: Tensor, ratios: Tensor) -> bytes:
    """The coefficient file of a basis: B (T, M), W (M, T) and the length ratios (T,), float64."""
    # clone: W may be a view of B, and safetensors refuses tensors that share memory.
    tables = {"B": B, "W": W, "ratios": ratios}
    return save({name: table.contiguous().clone() for name, table in tables.items()})


def load_coefficients(store: Store, name: str) -> tuple[Tensor, Tensor]:
    """B (T, M) and W (M, T) of a stored basis, float64.

    Raises StoreKeyError if there is no such basis, and DamagedError if its table is missing or
    differs from the record.
    """
    return existing_basis(store, name).coefficients()


def stored_bytes(store: Store, experiment: Experiment, parameters: int) -> dict[str, int]:
    """Sizes on disk by kind, and what T dense float32 vectors of `parameters` values would take.

    Only what the experiment uses is counted.
    """
    sizes = store.sizes()
    return {
        "dense_fp32": 4 * len(experiment.tasks) * parameters,
        "vectors": sum(vector_sizes(experiment, sizes).values()),
        "masks": _bytes_of_masks(sizes, experiment),
        "heads": _bytes_of_heads(sizes, experiment),
        "basis": _bytes_of_bases(sizes, experiment),
    }


def vector_sizes(experiment: Experiment, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the vector files of the experiment's tasks, by task, as far as they are there.

    sizes: of the files of the experiment's own store, by key.
    """
    found = _of_tasks(sizes, experiment.task_names)
    rest = [task for task in experiment.task_names if task not in found]
    other = library(experiment)
    if other is not None and rest:
        found |= _of_tasks(other.sizes("vectors"), rest)
    return found


def _of_tasks(sizes: Mapping[str, int], tasks: Sequence[str]) -> dict[str, int]:
    folders = {vector_prefix(task): task for task in tasks}
    found = {}
    for key, size in sizes.items():
        task, name = folders.get(records.prefix_of(key)), key.rpartition("/")[2]
        if task is not None and vector_file([name]) == name:
            found[task] = size
    return found


def _bytes_of_masks(sizes: Mapping[str, int], experiment: Experiment) -> int:
    """Bytes of the masks that the experiment's vectors were trained on."""
    ids = last_id(sizes) if experiment.shares_mask else experiment.task_names
    folders = {mask_prefix(mask_id) for mask_id in ids}
    total = 0
    for key, size in sizes.items():
        if key.endswith(".safetensors") and records.prefix_of(key) in folders:
            total += size
    return total


def _bytes_of_heads(sizes: Mapping[str, int], experiment: Experiment) -> int:
    """Bytes of the heads of the tasks that have vectors, wherever their store keeps them."""
    total = 0
    for task in experiment.task_names:
        first_format = f"{vector_prefix(task)}/{HEAD}"
        total += sizes.get(f"{head_prefix(task)}/{HEAD}", sizes.get(first_format, 0))
    return total


def _bytes_of_bases(sizes: Mapping[str, int], experiment: Experiment) -> int:
    """Bytes of the tensor files of the experiment's bases."""
    names = {spec.name for spec in basis_specs(experiment)}
    total = 0
    for key, size in sizes.items():
        folder, _, rest = key.partition("/")
        if folder == BASES and key.endswith(".safetensors") and rest.partition("/")[0] in names:
            total += size
    return total


def load_gram(store: Store, experiment: Experiment) -> Tensor | None:
    """The stored Gram matrix (T, T) float64 in the order of the experiment's tasks.

    None if the row of a task is missing, or is of another version of its vector.
    """
    state = GramState.read(store)
    vectors = basis_vectors_of(experiment, experiment.task_names)
    for task in experiment.task_names:
        if task not in vectors or state.checksums.get(task) != vectors[task].checksum:
            return None
    return state.ordered(experiment.task_names)
