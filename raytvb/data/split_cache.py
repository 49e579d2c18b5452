"""Validation and test images of an experiment, decoded once and kept in its store. So evaluations
do not need the data set.

    splits/<split>/<task>/{images-*.safetensors, labels.safetensors, record.json}

Images are uint8 at the model's resolution, in files of at most 64 MB. This is a cache: a split that
is damaged, or was made from other data, is decoded again.
"""

from __future__ import annotations

import json
from math import prod

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from raytvb.data.decoding import AS_USUAL
from raytvb.data.load_split import load_split
from raytvb.data.preprocess import Preprocess
from raytvb.data.splits import Split
from raytvb.data.suite_files import FORMAT
from raytvb.experiment.sections.data import DataConfig
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.storage import records
from raytvb.storage.contract import Contract, JsonObject
from raytvb.storage.damage import unreadable
from raytvb.storage.records import FileInfo, Record
from raytvb.storage.replacing import new_tag, tagged
from raytvb.storage.shapes import Size
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError
from raytvb.storage.tensor_file import tensor_of, tensors_of

PREFIX = "splits"

LABELS = "labels.safetensors"
"""Name of the file with the labels. A split that is written again has a tag in its files' names."""

_NOT_IMAGES = ("templates", "root")
"""Fields of a task's description that its images and labels do not depend on."""

_FILE_BYTES = 64 * 2**20


class SplitMetrics(Contract):
    """Metrics in the record of a decoded split."""

    images: Size = Field(ge=1)
    """Number N of images that could be read."""
    skipped: Size
    """Number of images that could not be read."""
    classes: tuple[str, ...]
    """Class names, in the order of the labels."""


def split_prefix(task: str, split: str) -> str:
    """Folder in the store for a split of a task."""
    return f"{PREFIX}/{split}/{task}"


def cached_split(
    store: Store,
    task: TaskConfig,
    split: str,
    preprocess: Preprocess,
    threads: int = 1,
    reading: DataConfig = AS_USUAL,
) -> Split:
    """A split from the store. If the store does not have it, it is decoded and stored.

    threads: number of images that are decoded at the same time. reading: how images are read.
    Raises as `load_split`.
    """
    prefix = split_prefix(task.name, split)
    identity = _identity(task, split, preprocess, reading)
    stored = _stored_split(store, prefix, identity)
    if stored is not None:
        return stored
    decoded = load_split(task, split, preprocess, threads=threads, reading=reading)
    _write(store, prefix, identity, decoded)
    return decoded


def _identity(
    task: TaskConfig, split: str, preprocess: Preprocess, reading: DataConfig
) -> JsonObject:
    """All that the images and labels of a split depend on."""
    unusual = reading.identity()
    described = task.described()
    return {
        **({"reading": unusual} if unusual else {}),
        "task": {k: v for k, v in described.items() if k not in _NOT_IMAGES},
        "split": split,
        "preprocess": preprocess.to_json(),
        "suite": FORMAT if task.data is None else None,
    }


def _write(store: Store, prefix: str, identity: JsonObject, split: Split) -> None:
    """Write the images, then the labels and the record. Then delete what was there before.

    Images are written file by file, so memory holds a second copy of at most one file.
    """
    tag = _tag(store, prefix, identity)
    bytes_per_image = split.images[0].numel()
    parts = split.images.split(max(1, _FILE_BYTES // bytes_per_image))
    infos = {}
    for number, part in enumerate(parts, 1):
        stem = f"images-{tag}" if tag else "images"
        name = f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
        data = save({"images": part.contiguous()})
        store.write(f"{prefix}/{name}", data)
        infos[name] = FileInfo.of(data)
    record = records.commit(
        store,
        prefix,
        identity=identity,
        written=infos,
        files={tagged(LABELS, tag): save({"labels": split.labels})},
        metrics=SplitMetrics(images=len(split), skipped=split.skipped, classes=split.classes),
    )
    kept = {f"{prefix}/{name}" for name in (*record.files, records.RECORD)}
    for key in store.keys(prefix):
        if key not in kept:
            store.delete(key)


def _tag(store: Store, prefix: str, identity: JsonObject) -> str:
    """The tag of a split's files: a split of another identity stays until this one is whole.

    A stored split of this identity is damaged, so its files may be written over.
    """
    try:
        record = records.find(store, prefix)
    except StoreError:
        return ""
    if record is None or record.is_of(identity):
        return ""
    return new_tag(store, prefix, json.dumps(identity, sort_keys=True).encode())


def _stored_split(store: Store, prefix: str, identity: JsonObject) -> Split | None:
    """The split in the store; None if it is missing, damaged or of another identity."""
    try:
        record = records.find(store, prefix)
        if record is None or not record.is_of(identity):
            return None
        return _read(store, prefix, record)
    except StoreError:
        return None


def _read(store: Store, prefix: str, record: Record) -> Split:
    """The split that a record describes. Raises DamagedError if the files do not match it."""
    metrics = record.metrics_as(SplitMetrics, store.where(prefix))
    labels: Tensor | None = None
    images: Tensor | None = None
    filled = 0
    for name in sorted(record.files):
        where = store.where(f"{prefix}/{name}")
        tensors = tensors_of(records.read_file(store, prefix, name, record), where)
        if name.startswith("labels"):
            labels = tensor_of(tensors, "labels", torch.int64, 1, where)
            continue
        part = tensor_of(tensors, "images", torch.uint8, 4, where)
        if images is None:
            if metrics.images * prod(part.shape[1:]) > record.size:
                raise unreadable(where, f"its record claims {metrics.images} images")
            images = torch.empty(metrics.images, *part.shape[1:], dtype=torch.uint8)
        if filled + len(part) > metrics.images or part.shape[1:] != images.shape[1:]:
            raise unreadable(where, f"it has images of shape {tuple(part.shape)}")
        images[filled : filled + len(part)] = part
        filled += len(part)
    if images is None or labels is None or not filled == len(labels) == metrics.images:
        raise unreadable(store.where(prefix), "its files have other numbers of images")
    if int(labels.min()) < 0 or int(labels.max()) >= len(metrics.classes):
        raise unreadable(store.where(prefix), "it has labels of other classes")
    return Split(images, labels, metrics.classes, metrics.skipped)
