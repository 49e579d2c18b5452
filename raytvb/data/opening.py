"""The source under a URL."""

from __future__ import annotations

from pathlib import Path

from raytvb.data.folders import FolderSource
from raytvb.data.parquet import ParquetSource
from raytvb.data.source import IMAGE_FILES, TORCHVISION, Source
from raytvb.data.torchvision_sets import TorchvisionSource
from raytvb.errors import UserError
from raytvb.experiment.tasks import TaskConfig
from raytvb.storage.store import Store


def open_source(task: TaskConfig, url: str, cache: Path) -> Source:
    """The source under a URL; `cache` is where torchvision's data sets go that have no `root`.

    Raises UserError where there is none, StoreError where the URL cannot be read.
    """
    if url.startswith(TORCHVISION):
        return TorchvisionSource(task, Path(task.root) if task.root else cache / "torchvision")
    store = Store(url)
    keys = [
        k
        for k in store.keys()
        if not any(part.startswith((".", "__MACOSX")) for part in k.split("/"))
    ]
    parquet = [k for k in keys if k.endswith(".parquet")]
    images = [k for k in keys if k.lower().endswith(IMAGE_FILES)]
    if parquet:
        return ParquetSource(task, store, parquet)
    if images:
        return FolderSource(task, store, images)
    if store.is_file():
        raise UserError(
            f"task {task.name}: {store.url} is a file; `data:` is the folder that it is in"
        )
    if not keys:
        raise UserError(f"task {task.name}: there is nothing under {store.url}")
    raise UserError(
        f"task {task.name}: no Parquet files (train*.parquet, test*.parquet) and no folders of images "
        f"under {store.url}; `data:` is the folder above them"
    )
