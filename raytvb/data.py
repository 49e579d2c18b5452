"""The splits of a task: which images belong to train, val and test, decoded and resized for a model.

Images come from the sources of `images`; the embedded suite is written as Parquet to a cache folder and goes through
the same reader. Decoded images lie in a temporary file that is mapped into memory, so the system drops and rereads them
as it needs to.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
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
from raytvb.images import ALIASES, Row, Source, open_source

SPLITS = ("train", "val", "test")
VAL_SHARE, TEST_SHARE = 0.1, 0.2  # of the training images, where a task has no validation, or no named splits at all
FORMAT = 2  # of the cached suite; raise it when the drawings change


@dataclass(frozen=True)
class Split:
    """Images (N, 3, S, S) uint8 at the model's resolution and labels (N,) int64 in range(len(classes)).

    `skipped` images of the split could not be read and are not among them.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    skipped: int = 0

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
    for split in SPLITS:
        target = folder / f"{split}.parquet"
        if not target.exists():
            table = suite_table(task, split)
            if len(table):
                temporary = target.with_name(f".{target.name}.{os.getpid()}")
                pq.write_table(table, temporary, row_group_size=256)
                os.replace(temporary, target)


def task_url(task: TaskConfig) -> str:
    """Where a task's images are; a task of the embedded suite is drawn into the cache first."""
    if task.data is not None:
        return task.data
    folder = cache_folder() / f"suite-{FORMAT}" / task.name
    write_suite_task(task.name, folder)
    return str(folder)


def _source(task: TaskConfig) -> Source:
    return open_source(task, task_url(task), cache_folder())


def task_classes(task: TaskConfig) -> tuple[str, ...]:
    """Class names of a task. Raises UserError where there are none, or no images."""
    if task.data is None:
        return task.classes or suite.class_names(task.name)
    return _source(task).classes


def check_task(task: TaskConfig, splits: Sequence[str]) -> tuple[str, ...]:
    """Class names of a task whose data has the splits. Raises UserError where it has not, without reading images."""
    if task.data is not None:
        source = _source(task)
        parts = split_parts(task, source)
        for split in splits:
            _require(task, source, parts, split)
    return task_classes(task)


def _require(task: TaskConfig, source: Source, parts: Mapping[str, Part], split: str) -> None:
    """Raise UserError that says what there is instead of a split, and how to name one."""
    if split not in parts:
        taken = {part.pool: s for s, part in parts.items()}
        there = ", ".join(f"{p} (taken for {taken[p]})" if p in taken else p for p in source.pools if p)
        allowed = "NAME" if split == "train" or "train" not in parts else "NAME or a share of train, such as 0.1"
        raise UserError(f"task {task.name}: no {split} split under {source.where} (there is {there}); "
                        f"`splits: {{{split}: {allowed}}}` of the task says what to use")


@dataclass(frozen=True)
class Part:
    """A split as the part of a pool between two shares of its seeded permutation; from 0 to 1 it is the whole pool."""

    pool: str
    start: float = 0.0
    stop: float = 1.0

    def members(self, source: Source, seed: int) -> np.ndarray:
        """Positions in the pool, rising (N,). Every part of a pool that is not empty gets at least one image."""
        count = source.count(self.pool)
        if (self.start, self.stop) == (0.0, 1.0):
            return np.arange(count)
        edges = [round(count * share) if share in (0.0, 1.0) else max(1, round(count * share))
                 for share in (self.start, self.stop)]
        edges[1] = max(edges[1], edges[0] + 1)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
        return np.sort(order[edges[0]:edges[1]])


def split_parts(task: TaskConfig, source: Source) -> dict[str, Part]:
    """What is train, val and test: what the task's `splits` say, else the pools of the usual names.

    A missing val is a tenth of train's pool; data without any named splits gives a fifth to test as well. A split that
    is not there is left out. Raises UserError for a name that the data does not have.
    """
    asked = {s: getattr(task.splits, s) for s in SPLITS}
    lower = {s: n.lower() for s, n in asked.items() if isinstance(n, str) and n not in source.pools}
    asked |= {s: n for s, n in lower.items() if n in source.pools}  # the usual names are found in any case
    unknown = {s: n for s, n in asked.items() if isinstance(n, str) and n not in source.pools}
    if unknown:
        there = ", ".join(p for p in source.pools if p) or "no named splits"
        raise UserError(f"task {task.name}: splits.{', splits.'.join(f'{s}: {n}' for s, n in unknown.items())}: "
                        f"{source.where} has {there} (a share of train is a number, such as 0.1)")
    taken = {n for n in asked.values() if isinstance(n, str)}
    names = {s: asked[s] if isinstance(asked[s], str) else
             next((a for a in ALIASES[s] if a in source.pools and a not in taken), None) if asked[s] is None else None
             for s in SPLITS}
    unnamed = source.pools == ("",)
    names["train"] = "" if unnamed else names["train"]
    found = {s: Part(n) for s, n in names.items() if n is not None and s != "train"}
    if names["train"] is None:
        return found
    default = {"val": VAL_SHARE, "test": TEST_SHARE if unnamed else None}
    used = 0.0
    for split in ("test", "val"):
        share = asked[split] if asked[split] is not None else default[split]
        if split not in found and share is not None:
            found[split] = Part(names["train"], used, used + share)
            used += share
    return found | {"train": Part(names["train"], used)}


@cache
def _geometry(document: str) -> list[Any]:
    """The geometric part of open_clip's evaluation transform (resize, crop, RGB), from its configuration as JSON."""
    import open_clip.transform as clip_transform  # takes seconds to import; images of the right size do without

    config = clip_transform.PreprocessCfg(**json.loads(document))
    transform = clip_transform.image_transform_v2(config, is_train=False)
    return list(transform.transforms[:-2])  # without ToTensor and Normalize


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey images of 16 bits scaled to 8, where Pillow would cut off at 255. ValueError for wider ones."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # PNG has 16 bits at most
        return Image.fromarray((np.asarray(image).astype(np.float32) / 257 + 0.5).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are {'floats' if image.mode == 'F' else '32-bit integers'}, whose range is not "
                         f"known: save it with 8 or 16 bits")
    return image


def _decode(row: Row, preprocess: Preprocess) -> np.ndarray | str:
    """An image as (3, S, S) uint8, or the reason why it cannot be read."""
    try:
        if isinstance(row.image, Exception):
            raise row.image
        if row.image is None:
            return "there is no image"
        if not isinstance(row.image, bytes | Image.Image):
            return f"the column holds {type(row.image).__name__}, not the bytes of an image"
        image = row.image if isinstance(row.image, Image.Image) else Image.open(io.BytesIO(row.image))
        image = _eight_bits(image)
        if image.size != (preprocess.size, preprocess.size) or image.mode != "RGB":
            for step in _geometry(json.dumps(dict(preprocess.config))):
                image = step(image)
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
    except UnidentifiedImageError:
        return "no format that is known"
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        return str(error) or type(error).__name__


def _decoded(rows: Iterator[Row], preprocess: Preprocess, threads: int) -> Iterator[tuple[Row, np.ndarray | str]]:
    """Rows with their decoded images, in their order; Pillow lets threads decode side by side."""
    decode = partial(_decode, preprocess=preprocess)
    if threads <= 1:
        yield from ((row, decode(row)) for row in rows)
        return
    with ThreadPoolExecutor(threads) as pool:
        while some := list(islice(rows, 8 * threads)):
            yield from zip(some, pool.map(decode, some), strict=True)


def load_split(task: TaskConfig, split: str, preprocess: Preprocess, *, threads: int = 1, sample: int | None = None,
               generator: torch.Generator | None = None) -> Split:
    """Read, decode and resize a split, or `sample` images of it that `generator` draws, in the order of the draw.

    The images lie in an unnamed temporary file ($TMPDIR) of N * 3 * S * S bytes, mapped into memory. Images that cannot
    be read are counted and left out. Raises UserError for a split that is not there or empty, a label outside the
    classes, and more unreadable images than the task's `max_corrupt`.
    """
    source = _source(task)
    classes, parts = source.classes, split_parts(task, source)
    _require(task, source, parts, split)
    members = parts[split].members(source, task.splits.seed)
    if not len(members):
        raise UserError(f"task {task.name}: the {split} split under {source.where} is empty")
    if sample is not None:
        members = members[torch.randperm(len(members), generator=generator)[:sample].numpy()]
    wanted = np.sort(members)
    labels, kept, skipped = list[int](), list[int](), list[str]()
    with tempfile.TemporaryFile(prefix="raytvb-images-") as file:
        rows = source.rows(parts[split].pool, wanted.tolist())
        for position, (row, image) in zip(wanted, _decoded(rows, preprocess, threads), strict=True):
            if isinstance(image, str):
                skipped.append(f"{row.name} is not a readable image: {image}")
                if len(skipped) > task.max_corrupt:
                    raise UserError(f"task {task.name}: {skipped[0]}" + (
                        f", and {len(skipped) - 1} more of {split}" if len(skipped) > 1 else "") +
                        f"; up to `max_corrupt: {task.max_corrupt}` of a split are skipped")
                continue
            labels.append(_label(task, row, classes))
            kept.append(int(position))
            file.write(image.data)
        if not kept:
            raise UserError(f"task {task.name}: the {split} split under {source.where} is empty: {skipped[0]}")
        file.flush()
        shape = (len(kept), 3, preprocess.size, preprocess.size)
        images = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r+", shape=shape))
    found = Split(images, torch.tensor(labels, dtype=torch.int64), classes, len(skipped))
    if sample is None:
        return found
    place = {position: k for k, position in enumerate(kept)}
    order = torch.tensor([place[int(m)] for m in members if int(m) in place])
    return Split(found.images[order], found.labels[order], classes, len(skipped))


def _label(task: TaskConfig, row: Row, classes: tuple[str, ...]) -> int:
    if isinstance(row.label, str) and row.label in classes:
        return classes.index(row.label)
    if not isinstance(row.label, int):
        raise UserError(f"task {task.name}: {row.name} has label {row.label!r}; labels are integers, 0 for the first "
                        f"class, or names of `classes`")
    if not 0 <= row.label < len(classes):
        raise UserError(f"task {task.name}: {row.name} has label {row.label!r}, but there are {len(classes)} classes")
    return int(row.label)
