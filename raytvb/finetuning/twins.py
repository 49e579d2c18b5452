"""Prepared twins: copies of task vectors, trimmed, dropped or sparsified, to make bases from.

The task vectors themselves are not changed. A twin belongs to one version of its vector, which the
twin's record names; for another version the twin is made again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from raytvb.errors import UserError, VectorError
from raytvb.experiment.config import Experiment
from raytvb.experiment.metrics import TwinMetrics
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.shared_masks import copy_mask
from raytvb.experiment.stored_vectors import StoredVector
from raytvb.experiment.task_store import TaskStore
from raytvb.maths.finite import listed, not_finite
from raytvb.maths.seeds import task_seed
from raytvb.maths.thresholds import global_thresholds
from raytvb.maths.trimming import PREPARE
from raytvb.models.worker_process import worker_setup
from raytvb.storage.mirror import Mirror
from raytvb.storage.records import Record
from raytvb.storage.replacing import commit_version
from raytvb.storage.vectors import VECTOR, VectorFile, vector_bytes, vector_info


def make_twin(experiment: Experiment, task: TaskConfig) -> None:
    """Commit the twin of a committed vector, if bases are made of twins and the twin is missing.

    A twin of another version of the vector, or by another method, is replaced. Raises UserError if
    the vector has not been committed. Raises VectorError if the vector's bytes differ from those
    recorded.
    """
    worker_setup()
    task_store = TaskStore(experiment, task)
    if not task_store.has_twin:
        return
    vector = task_store.vector()
    if vector is None:
        where = task_store.store.where(task_store.prefix)
        raise UserError(f"{where} is missing: run `raytvb finetune` first")
    write_twin(task_store, vector)


def write_twin(task_store: TaskStore, stored: StoredVector) -> None:
    """As `make_twin`, for this vector of the task."""
    before = task_store.twin() if task_store.has_twin else None
    if not task_store.has_twin or (before is not None and task_store.is_twin(before, stored)):
        return
    # A new mirror: its copies live only as long as the mirror.
    copies = Mirror(stored.store)
    vector = copies.vector(stored.key, stored.file)  # compared with its record while it is read
    experiment = task_store.experiment
    seed = task_seed(experiment.seed, f"{task_store.task.name}/prepare")
    values = twin_values(vector, experiment.basis.prepare, seed)
    _commit_twin(task_store, stored, vector, values, before)


def _commit_twin(
    task_store: TaskStore,
    stored: StoredVector,
    vector: VectorFile,
    values: dict[str, Tensor],
    before: Record | None,
) -> None:
    """Write the twin of a stored vector, and its record."""
    store, prefix = task_store.store, task_store.basis_vector_prefix
    parents, info = {"vector": stored.checksum}, vector_info(vector.info.base)
    if vector.mask is not None:
        parents["mask"] = vector.mask.fingerprint
        copy_mask(stored.store, store, vector.mask_key)
        path = os.path.relpath(vector.mask_key, prefix)
        info = vector_info(vector.info.base, mask_path=path, mask=vector.mask.fingerprint)
    bad = not_finite(values)
    if bad:
        raise VectorError(
            f"{store.where(prefix)} would have NaN or infinite values in {listed(bad)}",
            "use another method for basis.prepare",
        )
    # The folder may hold the twin of another version of the vector, which stays until then.
    commit_version(
        store,
        prefix,
        VECTOR,
        vector_bytes(values, info),
        before=before,
        identity=task_store.twin_identity,
        parents=parents,
        metrics=TwinMetrics(
            norm=norm(values), nonzero=sum(int(v.count_nonzero()) for v in values.values())
        ),
    )


def norm(values: dict[str, Tensor]) -> float:
    """Euclidean norm of a vector that is given as tensors by name; accumulated in float64."""
    return float(sum(tensor.double().square().sum() for tensor in values.values()) ** 0.5)


def twin_values(vector: VectorFile, method: str, seed: int) -> dict[str, Tensor]:
    """The stored tensors of a vector after a method of `maths.trimming.PREPARE`, float32.

    For a sparse vector the method sees only the kept entries. seed: seeds the draws of `dropped`.
    Memory: the result and one tensor. Raises KeyError for an unknown method.
    """
    transform = PREPARE[method]
    if method == "trimmed":
        thresholds = global_thresholds(lambda: (values for _, values in _tensors(vector)))
        return {n: transform(v, thresholds=thresholds)[0] for n, v in _tensors(vector)}
    if method == "dropped":
        generator = torch.Generator().manual_seed(seed)
        return {n: transform(v, generator=generator)[0] for n, v in _tensors(vector)}
    return {name: transform(values)[0] for name, values in _tensors(vector)}


def _tensors(vector: VectorFile) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors by name, (1, *shape) float32. Each is read when the iterator yields it."""
    first = 0
    for name, shape in vector.shapes.items():
        last = first + prod(shape)
        yield name, vector.values(first, last).view(1, *shape)
        first = last
