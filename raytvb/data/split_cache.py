"""Validation and test images of an experiment, decoded once and kept in its store: evaluations need
no data set.

    splits/<split>/<task>/{images-*.safetensors, labels.safetensors, record.json}

Images are uint8 at the model's resolution, in files of at most 64 MB. It is a cache: what is
damaged, or was made from other data, is made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from raytvb.data.loading import load_split
from raytvb.data.preprocess import Preprocess
from raytvb.data.splits import Split
from raytvb.data.suite_files import FORMAT
from raytvb.experiment.tasks import TaskConfig
from raytvb.storage import records
from raytvb.storage.records import FileInfo
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError

PREFIX = "splits"


_FILE_BYTES = 64 * 2**20


def split_prefix(task: str, split: str) -> str:
    """Folder of a task's images."""
    return f"{PREFIX}/{split}/{task}"


def _identity(task: TaskConfig, split: str, preprocess: Preprocess) -> dict[str, Any]:
    source = task.model_dump(mode="json", exclude={"epochs", "templates", "root"})
    return {
        "task": source,
        "split": split,
        "preprocess": {
            k: list(v) if isinstance(v, tuple) else v for k, v in preprocess.config.items()
        },
        "suite": FORMAT if task.data is None else None,
    }


def cached_split(
    store: Store, task: TaskConfig, split: str, preprocess: Preprocess, threads: int = 1
) -> Split:
    """A split from the store, or decoded by `load_split` (which see for errors) and kept there."""
    prefix, identity = split_prefix(task.name, split), _identity(task, split, preprocess)
    found = _read(store, prefix, identity)
    if found is not None:
        return found
    loaded = load_split(task, split, preprocess, threads=threads)
    store.delete(prefix)
    rows = max(1, _FILE_BYTES // (3 * preprocess.size**2))
    parts = loaded.images.split(rows)
    infos = {}
    for number, part in enumerate(parts, 1):
        name, data = (
            f"images-{number:05d}-of-{len(parts):05d}.safetensors",
            save({"images": part.contiguous()}),
        )
        store.write(f"{prefix}/{name}", data)
        infos[name] = FileInfo.of(data)
    records.commit(
        store,
        prefix,
        identity=identity,
        written=infos,
        files={"labels.safetensors": save({"labels": loaded.labels})},
        metrics={"images": len(loaded), "skipped": loaded.skipped, "classes": list(loaded.classes)},
    )
    return loaded


def _read(store: Store, prefix: str, identity: Mapping[str, Any]) -> Split | None:
    """What is there, if it is whole and was made from the same data."""
    try:
        record = records.find(store, prefix)
        if record is None or records.differences(record["identity"], dict(identity)):
            return None
        metrics, labels, done = record["metrics"], None, 0
        images: np.ndarray | None = None
        for name, info in sorted(record["files"].items()):
            data = store.read(f"{prefix}/{name}")
            if not FileInfo.from_json(info).is_of(data):
                return None
            if name == "labels.safetensors":
                labels = load(data)["labels"]
                continue
            part = load(data)["images"].numpy()
            if images is None:
                images = np.empty((metrics["images"], *part.shape[1:]), dtype=np.uint8)
            images[done : done + len(part)] = part
            done += len(part)
        if images is None or labels is None or not done == len(labels) == metrics["images"]:
            return None
        return Split(
            torch.from_numpy(images), labels, tuple(metrics["classes"]), metrics["skipped"]
        )
    except (StoreError, SafetensorError, KeyError, TypeError, ValueError, AttributeError):
        return None
