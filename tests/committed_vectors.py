"""Random vectors, committed to a store as fine-tunes do, for tests of what is built of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import vector_identity
from raytvb.experiment.layout import vector_prefix
from raytvb.experiment.parsing import parse_experiment
from raytvb.storage import records
from raytvb.storage.masks import Mask
from raytvb.storage.store import Store
from raytvb.storage.vectors import VECTOR, vector_bytes, vector_info
from raytvb.suite.task_names import task_names

SHAPES = {"visual.a": (40, 30), "visual.b": (17,), "visual.c": (3, 5, 7)}


def vector_key(task: str) -> str:
    return f"{vector_prefix(task)}/{VECTOR}"


def experiment(store: str, tasks: int | Sequence[str], **fields: Any) -> Experiment:
    """tasks: their names, or how many of the embedded suite."""
    return parse_experiment(
        {
            "store": store,
            "tasks": list(task_names()[:tasks] if isinstance(tasks, int) else tasks),
            "talos": {"density": 0.5},
            "basis": {"method": ["ae", "ae-anchored", "svd"]},
            "search": {"sizes": [2]},
            **fields,
        }
    )


def mask(seed: int = 0) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    return Mask.of({n: torch.rand(s, generator=generator) < 0.5 for n, s in SHAPES.items()})


def commit(
    asked: Experiment, index: int, *, seed: int | None = None, values: Tensor | None = None
) -> Tensor:
    """Store a vector as a fine-tune does. Returns its kept values in float64."""
    store, task = Store(asked.store), asked.tasks[index]
    chosen = mask()
    key = "masks/shared/mask.safetensors"
    if not store.exists(key):
        store.write(key, chosen.to_bytes())
    generator = torch.Generator().manual_seed(index if seed is None else seed)
    common = torch.randn(chosen.kept, generator=torch.Generator().manual_seed(99))
    flat = (
        0.3 * common + torch.randn(chosen.kept, generator=generator) if values is None else values
    )
    prefix = vector_prefix(task.name)
    info = vector_info(
        "base", mask_path=f"{'../' * (prefix.count('/') + 1)}{key}", mask=chosen.fingerprint
    )
    parts = flat.split([int(m.sum()) for m in chosen.tensors().values()])
    data = vector_bytes(dict(zip(chosen.shapes, parts, strict=True)), info)
    records.commit(
        store,
        prefix,
        identity=vector_identity(asked, task),
        files={"vector.safetensors": data},
        parents={"base": "base", "mask": chosen.fingerprint},
    )
    return flat.double()


def filled(folder: Path, tasks: int, **fields: Any) -> tuple[Experiment, Tensor]:
    """A store with all vectors, and V (K, T) float64."""
    asked = experiment(str(folder), tasks, **fields)
    return asked, torch.stack([commit(asked, i) for i in range(tasks)], dim=1)
