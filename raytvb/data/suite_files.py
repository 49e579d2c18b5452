"""The embedded suite as Parquet files in a cache folder, so that the same code reads it as other
data.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raytvb.data.image_source import SPLITS
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.suite.glyphs import render
from raytvb.suite.task_names import class_names

FORMAT = 2
"""Version of the cached suite. Increase it when the drawings change."""


def cache_folder() -> Path:
    """The cache of this machine: $RAYTVB_CACHE, else $XDG_CACHE_HOME/raytvb, else ~/.cache/raytvb.

    If there is no home, or no folder can be created in it, the cache is in the temporary folder.
    """
    configured = os.environ.get("RAYTVB_CACHE")
    if configured:
        return Path(configured)
    base = os.environ.get("XDG_CACHE_HOME")
    if not base and os.environ.get("HOME"):
        base = os.path.expanduser("~/.cache")
    folder = Path(base or tempfile.gettempdir()) / "raytvb"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / "raytvb"
    return folder


def suite_table(task: str, split: str) -> pa.Table:
    """A split of a task of the embedded suite, as an Arrow table of PNG images and labels.

    The metadata have the class names in the form that the Hugging Face hub uses.
    """
    rendered = render(task, split)
    rows = []
    for index, image in enumerate(rendered.images):
        rows.append({"bytes": _png(image), "path": f"{split}-{index}.png"})
    classes = {"names": list(class_names(task)), "_type": "ClassLabel"}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": classes}}}
    fields = [
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.field("label", pa.int64()),
    ]
    schema = pa.schema(fields, metadata={"huggingface": json.dumps(features)})
    return pa.table({"image": rows, "label": rendered.labels.tolist()}, schema=schema)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def write_suite_task(task: str, folder: Path) -> None:
    """Write `train`, `val` and `test` Parquet files of a task of the suite.

    Files that exist and empty splits are left out. Each file appears whole or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        target = folder / f"{split}.parquet"
        if target.exists():
            continue
        table = suite_table(task, split)
        if len(table):
            temporary = target.with_name(f".{target.name}.{os.getpid()}")
            pq.write_table(table, temporary, row_group_size=256)
            os.replace(temporary, target)


def task_url(task: TaskConfig) -> str:
    """The URL of a task's images. A task of the embedded suite is first drawn into the cache."""
    if task.data is not None:
        return task.data
    folder = cache_folder() / f"suite-{FORMAT}" / task.name
    write_suite_task(task.name, folder)
    return str(folder)
