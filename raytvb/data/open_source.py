"""Finds out which kind of data a URL holds, and opens it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from raytvb.data.folders import FolderSource, folder_pools
from raytvb.data.image_source import TORCHVISION, USUAL_POOLS, Source, reasons
from raytvb.data.listing import Listing, list_data
from raytvb.data.opening import image_endings
from raytvb.data.parquet import ParquetSource
from raytvb.data.parquet_files import parquet_pools, pool_of
from raytvb.data.pools import split_pools
from raytvb.data.torchvision_sets import TorchvisionSource
from raytvb.errors import UserError, listed
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.storage.store import Store

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
OTHER_TABLES = (".arrow", ".feather", ".csv", ".tsv", ".jsonl", ".json", ".npz", ".h5", ".tfrecord")


def open_source(task: TaskConfig, url: str, cache: Path) -> Source:
    """The source under a URL.

    cache: the folder for torchvision's data sets if the task has no `root`. Hidden files and
    folders are left out. Raises UserError if there are no images, and StoreError if the URL cannot
    be read.
    """
    if url.startswith(TORCHVISION):
        root = Path(os.path.expanduser(task.root)) if task.root else cache / "torchvision"
        return TorchvisionSource(task, root)
    store = Store(url)
    listing = list_data(store)
    names = [*listing.keys, *listing.other_names]
    if any(key.lower().endswith(".parquet") for key in names):
        return _parquet_source(task, store, listing)
    if any(key.lower().endswith(image_endings()) for key in names):
        return _folder_source(task, store, listing)
    _refuse(task, store, listing)


def _parquet_source(task: TaskConfig, store: Store, listing: Listing) -> Source:
    names = [*listing.keys, *listing.other_names]
    files = [key for key in names if key.lower().endswith(".parquet")]
    _name_files(task, store, listing, parquet_pools(task, files))
    parquet = [key for key in listing.keys if key.lower().endswith(".parquet")]
    images = [key for key in listing.keys if key.lower().endswith(image_endings())]
    read = {*parquet, *images}
    _check_one_kind(task, store, parquet, images)
    listing.leave_out(images, "images beside the Parquet files")
    others = [key for key in listing.keys if key not in read]
    listing.leave_out(others, "files that are not Parquet")
    return ParquetSource(task, store, parquet, listing)


def _folder_source(task: TaskConfig, store: Store, listing: Listing) -> Source:
    names = [*listing.keys, *listing.other_names]
    files = [key for key in names if key.lower().endswith(image_endings())]
    _name_files(task, store, listing, folder_pools(task, files))
    images = [key for key in listing.keys if key.lower().endswith(image_endings())]
    read = set(images)
    others = [key for key in listing.keys if key not in read]
    listing.leave_out(others, "files that are not images")
    return FolderSource(task, store, images, others, listing)


def _name_files(
    task: TaskConfig, store: Store, listing: Listing, pools: Mapping[str, Sequence[str]]
) -> None:
    """Decide under which of its names each file is read: one that lies in a split comes first.

    pools: all names by pool.
    """
    if not listing.other_names:
        return
    used = set(split_pools(task, tuple(pools), store.url).values())
    in_use = {name for pool in used for name in pools[pool]}
    listing.name_files(in_use.__contains__)


def _check_one_kind(task: TaskConfig, store: Store, parquet: list[str], images: list[str]) -> None:
    """Raise UserError if there are images in folders beside Parquet files of no known split."""
    named = {task.splits.train, task.splits.val, task.splits.test}
    pools = {pool_of(key) for key in parquet}
    in_folders = [key for key in images if "/" in key]
    if in_folders and not any(pool.lower() in USUAL_POOLS or pool in named for pool in pools):
        raise UserError(
            f"task {task.name}: {store.url} has both Parquet files ({parquet[0]}) and folders of "
            f"images ({in_folders[0]}): `data:` must be a folder with one of them"
        )


def _refuse(task: TaskConfig, store: Store, listing: Listing) -> NoReturn:
    """Raise UserError that says what the URL has instead of images."""
    place = f"task {task.name}: {store.url}"
    archives = [key for key in listing.keys if key.lower().endswith(ARCHIVES)]
    if store.url.lower().endswith(ARCHIVES) and not listing.keys:
        raise UserError(f"{place} is an archive: unpack it, and name the folder in `data:`")
    if store.is_file():
        raise UserError(f"{place} is a file; `data:` must be the folder that it is in")
    if not listing.keys:
        but = f" but {reasons(listing.left_out)}" if listing.left_out else ""
        raise UserError(
            f"task {task.name}: there is nothing under {store.url}{but}; `data:` must be a folder "
            f"with Parquet files or images"
        )
    if archives:
        raise UserError(
            f"{place} has archives ({listed(archives, 3)}) and no images: unpack them, as images "
            f"are not read from archives"
        )
    tables = [key for key in listing.keys if key.lower().endswith(OTHER_TABLES)]
    found = f" (there is {listed(tables or listing.keys, 3)})"
    raise UserError(
        f"task {task.name}: no Parquet files (train*.parquet, test*.parquet) and no folders of "
        f"images under {store.url}{found}; `data:` must be the folder above them"
    )
