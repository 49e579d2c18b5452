"""Opens the task vectors, bases and tables in the store of an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import save
from torch import Tensor

from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import (
    COEFFICIENTS,
    HEAD,
    VECTOR,
    basis_prefix,
    basis_vector_key,
    head_prefix,
    vector_key,
    vector_prefix,
)
from raytvb.storage import records
from raytvb.storage.basis_layout import tag_of
from raytvb.storage.damage import unreadable
from raytvb.storage.gram_state import GramState
from raytvb.storage.masks import MaskFile
from raytvb.storage.mirror import mirror
from raytvb.storage.replacing import tagged
from raytvb.storage.store import Store
from raytvb.storage.stored_basis import StoredBasis
from raytvb.storage.tensor_file import tensor_of, tensors_of
from raytvb.storage.vector_set import VectorSet


def vector_set(url: str, tasks: Sequence[str]) -> VectorSet:
    """The vectors of the given tasks, opened through the process's mirror."""
    copies = mirror(url)
    return VectorSet([copies.vector(vector_key(task)) for task in tasks])


def common_mask(experiment: Experiment) -> MaskFile | None:
    """The mask whose kept entries are the coordinates of the experiment's vectors.

    None if all entries are coordinates.

    Reads only headers. `vector_set` would copy every vector from a remote store. If all tasks share
    a mask, one vector tells which.
    """
    tasks = experiment.task_names if experiment.own_masks else experiment.task_names[:1]
    return VectorSet.open(Store(experiment.store), [vector_key(task) for task in tasks]).mask


def basis_vector_set(experiment: Experiment, tasks: Sequence[str] | None = None) -> VectorSet:
    """The vectors that the experiment's bases are made of, in the order of the given tasks.

    tasks: default: those of the experiment. The vectors are opened through the process's mirror.
    """
    copies = mirror(experiment.store)
    files = []
    for task in experiment.task_names if tasks is None else tasks:
        files.append(copies.vector(basis_vector_key(experiment, task)))
    return VectorSet(files)


def stored_basis(url: str, name: str) -> StoredBasis:
    """The vectors of a basis, opened through the process's mirror."""
    return mirror(url).basis(basis_prefix(name))


def write_coefficients(B: Tensor, W: Tensor) -> bytes:
    """The coefficient file of a basis: B (T, M) and W (M, T), float64."""
    # clone: W may be a view of B, and safetensors refuses tensors that share memory.
    return save({"B": B.contiguous().clone(), "W": W.contiguous().clone()})


def load_coefficients(store: Store, name: str) -> tuple[Tensor, Tensor]:
    """B (T, M) and W (M, T) of a stored basis, float64.

    Raises StoreKeyError if there is no such basis, and DamagedError if its table is missing or
    differs from the record.
    """
    prefix = basis_prefix(name)
    record = records.read_record(store, records.record_key(prefix))
    file = tagged(COEFFICIENTS, tag_of(record.files))
    where = store.where(f"{prefix}/{file}")
    tensors = tensors_of(records.read_file(store, prefix, file, record), where)
    B = tensor_of(tensors, "B", torch.float64, 2, where)
    W = tensor_of(tensors, "W", torch.float64, 2, where)
    if B.shape != W.T.shape:
        raise unreadable(where, f"B is {tuple(B.shape)}, and W is {tuple(W.shape)}")
    return B, W


def stored_bytes(store: Store, experiment: Experiment, parameters: int) -> dict[str, int]:
    """Sizes on disk by kind, and what T dense float32 vectors of `parameters` values would take."""
    sizes = store.sizes()
    return {
        "dense_fp32": 4 * len(experiment.tasks) * parameters,
        "vectors": _total(sizes, "vectors/", f"/{VECTOR}"),
        "masks": _total(sizes, "masks/", ".safetensors"),
        "heads": _bytes_of_heads(sizes, experiment),
        "basis": _total(sizes, "basis/", ".safetensors"),
    }


def _bytes_of_heads(sizes: Mapping[str, int], experiment: Experiment) -> int:
    """Bytes of the heads of the tasks that have vectors, wherever their store keeps them."""
    total = 0
    for task in experiment.task_names:
        first_format = f"{vector_prefix(task)}/{HEAD}"
        total += sizes.get(f"{head_prefix(task)}/{HEAD}", sizes.get(first_format, 0))
    return total


def _total(sizes: Mapping[str, int], prefix: str, ending: str) -> int:
    """Bytes of all keys with this beginning and this ending."""
    total = 0
    for key, size in sizes.items():
        if key.startswith(prefix) and key.endswith(ending):
            total += size
    return total


def load_gram(store: Store, experiment: Experiment) -> Tensor | None:
    """The stored Gram matrix (T, T) float64 in the order of the experiment's tasks.

    None if the row of a task is missing.
    """
    state = GramState.read(store)
    if not set(experiment.task_names) <= state.checksums.keys():
        return None
    return state.ordered(experiment.task_names)
