"""Finds out which kind of data a URL holds, and opens it."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from raytvb.data.folders import IMAGE_FILES, FolderSource
from raytvb.data.image_source import TORCHVISION, Source
from raytvb.data.parquet import ParquetSource
from raytvb.data.torchvision_sets import TorchvisionSource
from raytvb.errors import UserError
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.storage.store import Store


def open_source(task: TaskConfig, url: str, cache: Path) -> Source:
    """The source under a URL.

    cache: the folder for torchvision's data sets if the task has no `root`. Hidden files and
    folders are left out. Raises UserError if there are no images, and StoreError if the URL cannot
    be read.
    """
    if url.startswith(TORCHVISION):
        return TorchvisionSource(task, Path(task.root) if task.root else cache / "torchvision")
    store = Store(url)
    keys = [key for key in store.keys() if not _is_hidden(key)]
    parquet = [key for key in keys if key.endswith(".parquet")]
    if parquet:
        return ParquetSource(task, store, parquet)
    images = [key for key in keys if key.lower().endswith(IMAGE_FILES)]
    if images:
        return FolderSource(task, store, images)
    _refuse(task, store, keys)


def _is_hidden(key: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in key.split("/"))


def _refuse(task: TaskConfig, store: Store, keys: list[str]) -> NoReturn:
    """Raise UserError that says what the URL has instead of images."""
    if store.is_file():
        raise UserError(
            f"task {task.name}: {store.url} is a file; `data:` must be the folder that it is in"
        )
    if not keys:
        raise UserError(f"task {task.name}: there is nothing under {store.url}")
    raise UserError(
        f"task {task.name}: no Parquet files (train*.parquet, test*.parquet) and no folders of "
        f"images under {store.url}; `data:` must be the folder above them"
    )
