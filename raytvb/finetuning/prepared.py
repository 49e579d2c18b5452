"""Prepared twins of task vectors, for bases that are made of those."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import prepared_identity, vector_identity
from raytvb.experiment.layout import basis_vector_prefix, vector_key, vector_prefix
from raytvb.experiment.stored import basis_vector_record
from raytvb.experiment.tasks import TaskConfig
from raytvb.maths.seeds import task_seed
from raytvb.maths.thresholds import global_thresholds
from raytvb.maths.trimming import PREPARE
from raytvb.models.process import worker_setup
from raytvb.storage import records
from raytvb.storage.block_cache import damaged
from raytvb.storage.mirror import Mirror
from raytvb.storage.store import Store
from raytvb.storage.vectors import VectorFile, vector_bytes, vector_info


def prepare_vector(experiment: Experiment, task: TaskConfig) -> None:
    """Commit the prepared twin of a task's vector where bases are made of those, unless that of
    this vector is there.

    Raises UserError where the vector has not been committed, VectorError where its bytes are not
    those recorded.
    """
    name = experiment.basis.prepare
    if name == "none":
        return
    worker_setup()
    store, prefix = Store(experiment.store), basis_vector_prefix(experiment, task.name)
    record = records.find(store, vector_prefix(task.name), vector_identity(experiment, task))
    if record is None:
        raise UserError(
            f"{store.where(vector_key(task.name))} is missing: run `raytvb finetune` first"
        )
    identity = prepared_identity(experiment, task)
    if basis_vector_record(store, experiment, task.name) is not None:
        records.find(store, prefix, identity)
        return
    info = records.FileInfo.from_json(record["files"]["vector.safetensors"])
    copies = Mirror(store)  # its own: the process's may hold a vector that was made again since
    vector = copies.vector(vector_key(task.name))
    if not info.is_of(copies.local.read(vector.key)):
        raise damaged(store, vector.key)
    values = prepared(vector, name, task_seed(experiment.seed, f"{task.name}/prepare"))
    path = None if vector.mask is None else os.path.relpath(vector.mask_key, prefix)
    mask = None if vector.mask is None else vector.mask.fingerprint
    data = vector_bytes(values, vector_info(vector.info["base"], mask_path=path, mask=mask))
    store.delete(prefix)  # the twin of another vector
    records.commit(
        store,
        prefix,
        identity=identity,
        files={"vector.safetensors": data},
        parents={"vector": info.sha256} | ({} if mask is None else {"mask": mask}),
        metrics={
            "norm": float(sum(v.double().square().sum() for v in values.values()) ** 0.5),
            "nonzero": sum(int(v.count_nonzero()) for v in values.values()),
        },
    )


def prepared(vector: VectorFile, method: str, seed: int) -> dict[str, Tensor]:
    """The stored tensors of a vector after a method of `methods.PREPARE` (trimmed, dropped,
    sparsified), float32.

    Of a sparse vector it sees the kept entries only. seed: of the draws of dropped. Memory: the
    result.
    """

    def parameters() -> Iterator[tuple[str, Tensor]]:
        first = 0
        for name, shape in vector.shapes.items():
            last = first + prod(shape)
            yield name, vector.values(first, last).view(1, *shape)
            first = last

    options: dict[str, Any] = {}
    if method == "trimmed":
        options = {"thresholds": global_thresholds(lambda: (values for _, values in parameters()))}
    elif method == "dropped":
        options = {"generator": torch.Generator().manual_seed(seed)}
    return {name: PREPARE[method](values, **options)[0] for name, values in parameters()}
