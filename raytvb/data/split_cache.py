"""Validation and test images of an experiment, decoded once and kept in its store. So evaluations
do not need the data set.

    splits/<split>/<task>/{images-*.safetensors, labels.safetensors, record.json}

Images are uint8 at the model's resolution, in files of at most 64 MB. This is a cache: a split that
is damaged, or was made from other data, is decoded again.
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from raytvb.data.load_split import load_split
from raytvb.data.preprocess import Preprocess
from raytvb.data.splits import Split
from raytvb.data.suite_files import FORMAT
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.storage import records
from raytvb.storage.contract import Contract, JsonObject
from raytvb.storage.records import FileInfo, Record
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError

PREFIX = "splits"

LABELS = "labels.safetensors"

_FILE_BYTES = 64 * 2**20


class SplitMetrics(Contract):
    """Metrics in the record of a decoded split."""

    images: int
    """Number N of images that could be read."""
    skipped: int
    """Number of images that could not be read."""
    classes: tuple[str, ...]
    """Class names, in the order of the labels."""


class _DamagedError(ValueError):
    """The files of a stored split do not match its record."""


def split_prefix(task: str, split: str) -> str:
    """Folder in the store for a split of a task."""
    return f"{PREFIX}/{split}/{task}"


def cached_split(
    store: Store, task: TaskConfig, split: str, preprocess: Preprocess, threads: int = 1
) -> Split:
    """A split from the store. If the store does not have it, it is decoded and stored.

    threads: number of images that are decoded at the same time. Raises as `load_split`.
    """
    prefix = split_prefix(task.name, split)
    identity = _identity(task, split, preprocess)
    stored = _stored_split(store, prefix, identity)
    if stored is not None:
        return stored
    decoded = load_split(task, split, preprocess, threads=threads)
    store.delete(prefix)
    _write(store, prefix, identity, decoded)
    return decoded


def _identity(task: TaskConfig, split: str, preprocess: Preprocess) -> JsonObject:
    """All that the images and labels of a split depend on."""
    return {
        "task": task.model_dump(mode="json", exclude={"epochs", "templates", "root"}),
        "split": split,
        "preprocess": preprocess.to_json(),
        "suite": FORMAT if task.data is None else None,
    }


def _write(store: Store, prefix: str, identity: JsonObject, split: Split) -> None:
    """Write the images, then the labels and the record.

    Images are written file by file, so memory holds a second copy of at most one file.
    """
    bytes_per_image = split.images[0].numel()
    parts = split.images.split(max(1, _FILE_BYTES // bytes_per_image))
    infos = {}
    for number, part in enumerate(parts, 1):
        name = f"images-{number:05d}-of-{len(parts):05d}.safetensors"
        data = save({"images": part.contiguous()})
        store.write(f"{prefix}/{name}", data)
        infos[name] = FileInfo.of(data)
    records.commit(
        store,
        prefix,
        identity=identity,
        written=infos,
        files={LABELS: save({"labels": split.labels})},
        metrics=SplitMetrics(images=len(split), skipped=split.skipped, classes=split.classes),
    )


def _stored_split(store: Store, prefix: str, identity: JsonObject) -> Split | None:
    """The split in the store; None if it is missing, damaged or of another identity."""
    try:
        record = records.find(store, prefix)
        if record is None or not record.is_of(identity):
            return None
        return _read(store, prefix, record)
    except (StoreError, SafetensorError, KeyError, _DamagedError):
        return None


def _read(store: Store, prefix: str, record: Record) -> Split:
    """The split that a record describes. Raises _DamagedError if the files do not match it."""
    metrics = record.metrics_as(SplitMetrics, store.where(prefix))
    labels: Tensor | None = None
    images: np.ndarray | None = None
    filled = 0
    for name, info in sorted(record.files.items()):
        data = store.read(f"{prefix}/{name}")
        if not info.is_of(data):
            raise _DamagedError(name)
        if name == LABELS:
            labels = load(data)["labels"]
            continue
        part = load(data)["images"].numpy()
        if images is None:
            images = np.empty((metrics.images, *part.shape[1:]), dtype=np.uint8)
        if filled + len(part) > metrics.images:
            raise _DamagedError(name)
        images[filled : filled + len(part)] = part
        filled += len(part)
    if images is None or labels is None or not filled == len(labels) == metrics.images:
        raise _DamagedError(prefix)
    return Split(torch.from_numpy(images), labels, metrics.classes, metrics.skipped)
