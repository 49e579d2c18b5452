"""Task vectors, bases and their tables as a store of an experiment has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import (
    basis_prefix,
    basis_vector_key,
    basis_vector_prefix,
    vector_key,
    vector_prefix,
)
from raytvb.storage import records
from raytvb.storage.gram_state import GramState
from raytvb.storage.mirror import mirror
from raytvb.storage.store import Store
from raytvb.storage.stored_basis import StoredBasis
from raytvb.storage.vector_set import VectorSet


def basis_vector_record(store: Store, experiment: Experiment, task: str) -> dict[str, Any] | None:
    """Record of the vector that bases are made of; None where it is not there, or of a vector that
    was made again.
    """
    record = records.find(store, vector_prefix(task))
    if record is None or experiment.basis.prepare == "none":
        return record
    twin = records.find(store, basis_vector_prefix(experiment, task))
    present = record["files"]["vector.safetensors"]["sha256"]
    return twin if twin is not None and twin["parents"]["vector"] == present else None


def vector_set(url: str, tasks: Sequence[str]) -> VectorSet:
    """The vectors of the given tasks, opened through the process's mirror."""
    return VectorSet([mirror(url).vector(vector_key(t)) for t in tasks])


def basis_vector_set(experiment: Experiment) -> VectorSet:
    """The vectors that the experiment's bases are made of, in the order of its tasks; opened as
    `vector_set` does.
    """
    keys = [basis_vector_key(experiment, t) for t in experiment.task_names]
    return VectorSet([mirror(experiment.store).vector(k) for k in keys])


def stored_basis(url: str, name: str) -> StoredBasis:
    """The vectors of a basis, opened through the process's mirror."""
    return mirror(url).basis(basis_prefix(name))


def write_coefficients(B: Tensor, W: Tensor) -> bytes:
    """The coefficient file of a basis: B (T, M) and W (M, T), float64."""
    # Copies: W may be a view of B, and safetensors refuses tensors that share memory.
    return save({"B": B.contiguous().clone(), "W": W.contiguous().clone()})


def load_coefficients(store: Store, name: str) -> tuple[Tensor, Tensor]:
    """B (T, M) and W (M, T) of a stored basis, float64."""
    tensors = load(store.read(f"{basis_prefix(name)}/coefficients.safetensors"))
    return tensors["B"], tensors["W"]


def stored_bytes(store: Store, experiment: Experiment, parameters: int) -> dict[str, int]:
    """Sizes on disk by kind, and what T dense float32 vectors would take."""
    sizes = {k: store.size(k) for k in store.keys()}

    def total(prefix: str, ending: str) -> int:
        return sum(s for k, s in sizes.items() if k.startswith(prefix) and k.endswith(ending))

    return {
        "dense_fp32": 4 * len(experiment.tasks) * parameters,
        "vectors": total("vectors/", "/vector.safetensors"),
        "masks": total("masks/", ".safetensors"),
        "heads": total("vectors/", "/head.safetensors"),
        "basis": total("basis/", ".safetensors"),
    }


def load_gram(store: Store, experiment: Experiment) -> Tensor | None:
    """The stored Gram matrix (T, T) in the order of the tasks, or None where a task's row is
    missing.
    """
    state = GramState.read(store)
    known = set(experiment.task_names) <= state.checksums.keys()
    return state.ordered(experiment.task_names) if known else None
