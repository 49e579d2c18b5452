"""Labelled images: Parquet in the layout of the CLIP task collections on the Hugging Face hub.

A task is a folder (local or any fsspec URL) with `train*.parquet`, `val*.parquet` or `validation*.parquet`, and
`test*.parquet`, also under `data/`. An image column holds `{bytes, path}` structs or binary, a label column integers;
class names come from the `huggingface` entry of the Arrow schema metadata unless they are given. The embedded suite is
written in the same layout to a cache folder and goes through the same reader.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from raytvb import suite
from raytvb.config import TaskConfig
from raytvb.encoder import Preprocess
from raytvb.errors import UserError
from raytvb.store import Store

PREFIXES = {"train": ("train",), "val": ("val",), "test": ("test",)}  # "val" also begins "validation"
VAL_SHARE = 0.1  # of the training images, where a task has no validation files
FORMAT = 2  # of the cached suite; raise it when the drawings change


@dataclass(frozen=True)
class Split:
    """Images (N, 3, S, S) uint8 at the model's resolution and labels (N,) int64 in range(len(classes))."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def cache_folder() -> Path:
    """Per-machine cache: $RAYTVB_CACHE, else $XDG_CACHE_HOME/raytvb, else ~/.cache/raytvb, else a temporary one."""
    given = os.environ.get("RAYTVB_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("HOME", "") and os.path.expanduser("~/.cache"))
    folder = Path(base or tempfile.gettempdir()) / "raytvb"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / "raytvb"
    return folder


def suite_table(task: str, split: str) -> pa.Table:
    """A split of a task of the embedded suite as an Arrow table of PNG images and labels, with its class names."""
    rendered = suite.render(task, split)
    rows = []
    for index, image in enumerate(rendered.images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
        rows.append({"bytes": buffer.getvalue(), "path": f"{split}-{index}.png"})
    classes = {"names": list(suite.class_names(task)), "_type": "ClassLabel"}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": classes}}}
    fields = [pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
              pa.field("label", pa.int64())]
    schema = pa.schema(fields, metadata={"huggingface": json.dumps(features)})
    return pa.table({"image": rows, "label": rendered.labels.tolist()}, schema=schema)


def write_suite_task(task: str, folder: Path) -> None:
    """Write `train`, `val` and `test` Parquet files of a task of the suite; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in PREFIXES:
        target = folder / f"{split}.parquet"
        if not target.exists():
            table = suite_table(task, split)
            if len(table):
                temporary = target.with_name(f".{target.name}.{os.getpid()}")
                pq.write_table(table, temporary, row_group_size=256)
                os.replace(temporary, target)


def task_url(task: TaskConfig) -> str:
    """Where a task's Parquet files are; a task of the embedded suite is drawn into the cache first."""
    if task.data is not None:
        return task.data
    folder = cache_folder() / f"suite-{FORMAT}" / task.name
    write_suite_task(task.name, folder)
    return str(folder)


def _split_keys(store: Store) -> dict[str, list[str]]:
    """Parquet files by split, sorted by name."""
    names = [k for k in store.keys() if k.endswith(".parquet")]
    return {split: [k for k in names if posixpath.basename(k).startswith(prefixes)]
            for split, prefixes in PREFIXES.items()}


@contextmanager
def _parquet(task: TaskConfig, store: Store, key: str) -> Iterator[pq.ParquetFile]:
    """An open Parquet file. Raises UserError, naming task and file, for anything else."""
    with store.fs.open(store.path(key), "rb") as file:
        try:
            yield pq.ParquetFile(file)
        except pa.ArrowException as error:
            raise UserError(f"task {task.name}: {store.where(key)} is not a whole Parquet file: {error}") from None
        except OSError as error:  # damaged pages, or a network that may recover: worth another try
            raise OSError(f"task {task.name}: {store.where(key)}: {error}") from error


def _class_names(task: TaskConfig, schema: pa.Schema) -> tuple[str, ...]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[task.label_column]["names"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"task {task.name}: {task.data} has no class names in its Parquet metadata; "
                        f"give them as `classes: [...]` of the task") from None


def task_classes(task: TaskConfig) -> tuple[str, ...]:
    """Class names of a task. Raises UserError where there are none, or no Parquet files."""
    if task.data is None:
        return task.classes or suite.class_names(task.name)
    store = Store(task.data)
    keys = [k for split in _split_keys(store).values() for k in split]
    if not keys:
        raise UserError(f"task {task.name}: no train*.parquet, val*.parquet or test*.parquet under {task.data}")
    if task.classes is not None:
        return task.classes
    with _parquet(task, store, keys[0]) as parquet:
        return _class_names(task, parquet.schema_arrow)


@cache
def _geometry(document: str) -> list[Any]:
    """The geometric part of open_clip's evaluation transform (resize, crop, RGB), from its configuration as JSON."""
    import open_clip.transform as clip_transform  # takes seconds to import; images of the right size do without

    config = clip_transform.PreprocessCfg(**json.loads(document))
    transform = clip_transform.image_transform_v2(config, is_train=False)
    return list(transform.transforms[:-2])  # without ToTensor and Normalize


def _decode(data: bytes | None, preprocess: Preprocess) -> np.ndarray:
    """An encoded image as (S, S, 3) uint8. Raises what Pillow raises for other bytes, TypeError for none."""
    if data is None:
        raise TypeError("there is no image")
    image = Image.open(io.BytesIO(data))
    if image.size != (preprocess.size, preprocess.size) or image.mode != "RGB":
        for step in _geometry(json.dumps(dict(preprocess.config))):
            image = step(image)
    return np.asarray(image, dtype=np.uint8)


def _rows(task: TaskConfig, store: Store, keys: list[str]) -> Iterator[tuple[str, bytes | None, int]]:
    """(name of the row, encoded image, label) in file order; one row group is in memory at a time."""
    for key in keys:
        with _parquet(task, store, key) as parquet:
            missing = {task.image_column, task.label_column} - set(parquet.schema_arrow.names)
            if missing:
                raise UserError(f"task {task.name}: {key} has no column {', '.join(sorted(missing))}; it has "
                                f"{', '.join(parquet.schema_arrow.names)} (`image_column`, `label_column` name them)")
            row = 0
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, columns=[task.image_column, task.label_column])
                images, labels = (table[c].to_pylist() for c in (task.image_column, task.label_column))
                for image, label in zip(images, labels, strict=True):
                    yield f"{key} row {row}", image.get("bytes") if isinstance(image, dict) else image, label
                    row += 1


def load_split(task: TaskConfig, split: str, preprocess: Preprocess) -> Split:
    """Read, decode and resize a split. N * 3 * S * S bytes of memory.

    A task without validation files gives every tenth training image to validation. Raises UserError for a folder
    without files for the split, an empty split, a label outside the classes or an image that cannot be decoded.
    """
    store = Store(task_url(task))
    keys = _split_keys(store)
    classes = task_classes(task)
    carved = split != "test" and not keys["val"]
    files = keys["train"] if carved else keys[split]
    if not files:
        raise UserError(f"task {task.name}: no {split}*.parquet under {store.url}")
    images, labels = [], []
    for index, (name, data, label) in enumerate(_rows(task, store, files)):
        if carved and (index % round(1 / VAL_SHARE) == 0) != (split == "val"):
            continue
        if not isinstance(label, int):
            raise UserError(f"task {task.name}: {name} has label {label!r}; labels are integers, 0 for the first class")
        if not 0 <= label < len(classes):
            raise UserError(f"task {task.name}: {name} has label {label!r}, but there are {len(classes)} classes")
        try:
            images.append(_decode(data, preprocess))
        except UnidentifiedImageError:
            raise UserError(f"task {task.name}: {name} is not a readable image: no format that is known") from None
        except (OSError, SyntaxError, TypeError, Image.DecompressionBombError) as error:  # all that Pillow raises
            raise UserError(f"task {task.name}: {name} is not a readable image: {error}") from None
        labels.append(label)
    if not images:
        raise UserError(f"task {task.name}: the {split} split under {store.url} is empty")
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Split(pixels, torch.tensor(labels, dtype=torch.int64), classes)
