"""The embedded suite as Parquet files in a cache folder, so that it goes through the same reader as
other data.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raytvb.data.source import SPLITS
from raytvb.experiment.tasks import TaskConfig
from raytvb.suite import glyphs

FORMAT = 2  # of the cached suite; raise it when the drawings change


def cache_folder() -> Path:
    """Per-machine cache: $RAYTVB_CACHE, else $XDG_CACHE_HOME/raytvb, else ~/.cache/raytvb, else a
    temporary one.
    """
    given = os.environ.get("RAYTVB_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or (
        os.environ.get("HOME", "") and os.path.expanduser("~/.cache")
    )
    folder = Path(base or tempfile.gettempdir()) / "raytvb"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / "raytvb"
    return folder


def suite_table(task: str, split: str) -> pa.Table:
    """A split of a task of the embedded suite as an Arrow table of PNG images and labels, with its
    class names.
    """
    rendered = glyphs.render(task, split)
    rows = []
    for index, image in enumerate(rendered.images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
        rows.append({"bytes": buffer.getvalue(), "path": f"{split}-{index}.png"})
    classes = {"names": list(glyphs.class_names(task)), "_type": "ClassLabel"}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": classes}}}
    fields = [
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.field("label", pa.int64()),
    ]
    schema = pa.schema(fields, metadata={"huggingface": json.dumps(features)})
    return pa.table({"image": rows, "label": rendered.labels.tolist()}, schema=schema)


def write_suite_task(task: str, folder: Path) -> None:
    """Write `train`, `val` and `test` Parquet files of a task of the suite; each file appears whole
    or not at all.
    """
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
