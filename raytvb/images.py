"""Where labelled images come from: Parquet files, folders with a folder per class, and torchvision's data sets.

Parquet is read as the CLIP task collections on the Hugging Face hub have it: an image column of `{bytes, path}` structs
or binary, a label column of integers, class names in the `huggingface` entry of the Arrow schema metadata. Folders and
Parquet may lie under any fsspec URL (s3://, hf://datasets/OWNER/NAME). A source has one or several *pools* of images
(train, validation, test...; the pool '' where there are no names), read in one pass with a bounded part in memory.
"""

from __future__ import annotations

import inspect
import json
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from PIL import Image

from raytvb.config import TaskConfig
from raytvb.errors import UserError
from raytvb.store import Store

TORCHVISION = "torchvision:"
ALIASES = {"train": ("train", "training", "trainval"), "val": ("val", "valid", "validation", "dev"),
           "test": ("test", "testing")}
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
ROWS_AT_ONCE = 64  # encoded images in memory: what one read asks for
_STREAM_BYTES = 2**20  # of a Parquet column: else a row group is held whole, and many files are one row group
_SHARD = re.compile(r"[-_.]?(\d+(-of-\d+)?(-[0-9a-f]{8,})?)?$")


@dataclass(frozen=True)
class Row:
    """One image, encoded or opened or the reason why there is none, with its label; `name` is for messages."""

    name: str
    image: bytes | Image.Image | Exception | None
    label: Any


class Source(Protocol):
    """Labelled images in one or several pools."""

    where: str

    @property
    def pools(self) -> tuple[str, ...]:
        """Names of the pools; '' for the one pool of data without named splits."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names. Raises UserError where there are none."""

    def count(self, pool: str) -> int:
        """Images of a pool, readable or not."""

    def rows(self, pool: str, wanted: Sequence[int]) -> Iterator[Row]:
        """The images at some positions of a pool, which rise; little else is read."""


def open_source(task: TaskConfig, url: str, cache: Path) -> Source:
    """The source under a URL; `cache` is where torchvision's data sets go that have no `root`.

    Raises UserError where there is none, StoreError where the URL cannot be read.
    """
    if url.startswith(TORCHVISION):
        return TorchvisionSource(task, Path(task.root) if task.root else cache / "torchvision")
    store = Store(url)
    keys = [k for k in store.keys() if not any(part.startswith((".", "__MACOSX")) for part in k.split("/"))]
    parquet = [k for k in keys if k.endswith(".parquet")]
    images = [k for k in keys if k.lower().endswith(IMAGE_FILES)]
    if parquet:
        return ParquetSource(task, store, parquet)
    if images:
        return FolderSource(task, store, images)
    if store.is_file():
        raise UserError(f"task {task.name}: {store.url} is a file; `data:` is the folder that it is in")
    if not keys:
        raise UserError(f"task {task.name}: there is nothing under {store.url}")
    raise UserError(f"task {task.name}: no Parquet files (train*.parquet, test*.parquet) and no folders of images "
                    f"under {store.url}; `data:` is the folder above them")


_KNOWN = frozenset(alias for aliases in ALIASES.values() for alias in aliases)


def _pools(task: TaskConfig, keys: Sequence[str], name: Callable[[str], str]) -> dict[str, list[str]]:
    """Keys by the name of their pool: a usual one, in lower case, or one that the task asks for; else '' for all."""
    named: dict[str, list[str]] = {}
    for key in keys:
        found = name(key)
        named.setdefault(found.lower() if found.lower() in _KNOWN else found, []).append(key)
    asked = {s for s in (task.splits.train, task.splits.val, task.splits.test) if isinstance(s, str)}
    return named if (_KNOWN | asked) & named.keys() else {"": list(keys)}


class ParquetSource:
    """Parquet files named after their split (`train-00000-of-00002.parquet`) or in a folder of its name."""

    def __init__(self, task: TaskConfig, store: Store, keys: Sequence[str]) -> None:
        self._task, self._store, self.where = task, store, store.url
        self._keys = _pools(task, keys, self._pool)
        for pool, found in self._keys.items():
            folders = sorted({self._configuration(k, pool) for k in found})
            if pool and len(folders) > 1:
                raise UserError(f"task {task.name}: {store.url} has {pool} files in several folders "
                                f"({', '.join(f or '.' for f in folders)}); name one of them in `data:`")

    @staticmethod
    def _pool(key: str) -> str:
        """train for `train-00000-of-00002.parquet`, `train.parquet` and `train/0000.parquet`."""
        folder, name = posixpath.split(key)
        stem = _SHARD.sub("", name.removesuffix(".parquet"))
        first = re.split(r"[-_.]", stem)[0]
        return first if first.lower() in _KNOWN else stem or posixpath.basename(folder)

    @staticmethod
    def _configuration(key: str, pool: str) -> str:
        folder = posixpath.dirname(key)
        return posixpath.dirname(folder) if posixpath.basename(folder).lower() == pool else folder

    @property
    def pools(self) -> tuple[str, ...]:
        """Names before the shard numbers."""
        return tuple(self._keys)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names from the Hugging Face metadata of a pool's first file, unless the task gives them."""
        if self._task.classes is not None:
            return self._task.classes
        for keys in self._keys.values():
            with self._open(keys[0]) as parquet:
                metadata = parquet.schema_arrow.metadata or {}
            try:
                features = json.loads(metadata[b"huggingface"])["info"]["features"]
                return tuple(features[self._task.label_column]["names"])
            except (KeyError, TypeError, ValueError):
                continue
        raise UserError(f"task {self._task.name}: {self.where} has no class names in its Parquet metadata; "
                        f"give them as `classes: [...]` of the task")

    @contextmanager
    def _open(self, key: str) -> Iterator[pq.ParquetFile]:
        """An open Parquet file. Raises UserError, naming task and file, for anything else."""
        place = f"task {self._task.name}: {self._store.where(key)}"
        with self._store.fs.open(self._store.path(key), "rb") as file:
            try:
                yield pq.ParquetFile(file, buffer_size=_STREAM_BYTES, pre_buffer=False)
            except pa.ArrowException as error:
                raise UserError(f"{place} is not a whole Parquet file: {error}") from None
            except OSError as error:  # damaged pages, or a network that may recover: worth another try
                raise OSError(f"{place}: {error}") from error

    def count(self, pool: str) -> int:
        """Rows, from the files' footers."""
        total = 0
        for key in self._keys[pool]:
            with self._open(key) as parquet:
                total += parquet.metadata.num_rows
        return total

    def rows(self, pool: str, wanted: Sequence[int]) -> Iterator[Row]:
        """Rows in the order of the files' names; a few at a time are in memory, never a row group."""
        task, todo, before = self._task, set(wanted), 0
        for key in self._keys[pool]:
            with self._open(key) as parquet:
                missing = {task.image_column, task.label_column} - set(parquet.schema_arrow.names)
                if missing:
                    raise UserError(f"task {task.name}: {key} has no column {', '.join(sorted(missing))}; it has "
                                    f"{', '.join(parquet.schema_arrow.names)} (`image_column`, `label_column` name "
                                    f"them)")
                number = 0
                for group in range(parquet.num_row_groups):
                    count = parquet.metadata.row_group(group).num_rows
                    if todo.isdisjoint(range(before + number, before + number + count)):
                        number += count
                        continue
                    for batch in parquet.iter_batches(ROWS_AT_ONCE, [group], [task.image_column, task.label_column],
                                                      use_threads=False):
                        for place in range(len(batch)):
                            if before + number in todo:
                                image, label = (batch.column(c)[place].as_py() for c in (
                                    task.image_column, task.label_column))
                                data = image.get("bytes") if isinstance(image, dict) else image
                                yield Row(f"{key} row {number}", data, label)
                            number += 1
                before += number


class FolderSource:
    """Images in a folder per class, under folders named after the splits or without those.

    Classes are numbered in the order of their folders' names, over all splits.
    """

    def __init__(self, task: TaskConfig, store: Store, keys: Sequence[str]) -> None:
        self._task, self._store, self.where = task, store, store.url
        self._keys = _pools(task, keys, lambda key: key.split("/")[0] if "/" in key else "")
        self._depth = 0 if "" in self._keys else 1
        outside = [k for k in keys if k.count("/") <= self._depth]
        if outside:
            raise UserError(f"task {task.name}: {store.where(outside[0])} is in no folder of a class (a folder tree is "
                            f"CLASS/image.jpg or SPLIT/CLASS/image.jpg; splits are train, val and test)")
        self._folders = sorted({self._folder(k) for k in keys})
        inner = [frozenset(k.split("/")[1] for k in keys if k.startswith(f"{f}/")) for f in self._folders]
        if not self._depth and len(inner) > 1 and len(inner[0]) > 1 and len(set(inner)) == 1 and all(
                k.count("/") > 1 for k in keys):
            raise UserError(f"task {task.name}: {store.url} has the same folders ({', '.join(sorted(inner[0])[:3])}…) "
                            f"in each of {', '.join(self._folders[:5])}: if these are splits, say which with "
                            f"`splits: {{train: {self._folders[0]}, test: {self._folders[-1]}}}`")
        if len(self._folders) == 1:
            raise UserError(f"task {task.name}: all images under {store.url} are in one class, {self._folders[0]}; "
                            f"`data:` is the folder above those of the classes, or of the splits")

    def _folder(self, key: str) -> str:
        return key.split("/")[self._depth]

    @property
    def pools(self) -> tuple[str, ...]:
        """The upper folders, where one of them has the name of a split."""
        return tuple(self._keys)

    @property
    def classes(self) -> tuple[str, ...]:
        """The folders' names, or as many names that the task gives in their order."""
        given = self._task.classes
        if given is None:
            return tuple(self._folders)
        if len(given) != len(self._folders):
            raise UserError(f"task {self._task.name}: {len(given)} `classes` are given, but {self.where} has "
                            f"{len(self._folders)} folders of classes ({', '.join(self._folders[:5])}, …)")
        return given

    def count(self, pool: str) -> int:
        """Files with the ending of an image."""
        return len(self._keys[pool])

    def rows(self, pool: str, wanted: Sequence[int]) -> Iterator[Row]:
        """Files in the order of their names, a few requests at a time."""
        numbers = {folder: k for k, folder in enumerate(self._folders)}
        keys = iter([self._keys[pool][k] for k in wanted])
        while some := list(islice(keys, ROWS_AT_ONCE)):
            for key, data in zip(some, self._store.read_many(some), strict=True):
                yield Row(key, data, numbers[self._folder(key)])


def _by_train(name: str, **options: Any) -> tuple[str, dict[str, dict[str, Any]]]:
    return name, {"train": {"train": True, **options}, "test": {"train": False, **options}}


def _by_split(name: str, *splits: str) -> tuple[str, dict[str, dict[str, Any]]]:
    return name, {s: {"split": s} for s in splits}


# Our name -> class in torchvision.datasets and its arguments by pool.
DATA_SETS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    **{n: _by_train(n) for n in ("MNIST", "FashionMNIST", "KMNIST", "USPS", "CIFAR10", "CIFAR100")},
    **{f"EMNIST-{s}": _by_train("EMNIST", split=s) for s in ("balanced", "byclass", "bymerge", "digits", "letters")},
    **{n: _by_split(n, "train", "test") for n in ("SVHN", "STL10", "Food101", "GTSRB", "StanfordCars", "FER2013")},
    **{n: _by_split(n, "train", "val", "test") for n in ("DTD", "Flowers102", "PCAM", "RenderedSST2", "FGVCAircraft")},
    **{n: _by_split(n, "train", "val") for n in ("ImageNet", "Imagenette")},
    "Country211": _by_split("Country211", "train", "valid", "test"),
    "OxfordIIITPet": _by_split("OxfordIIITPet", "trainval", "test"),
    **{n: (n, {"": {}}) for n in ("EuroSAT", "SUN397", "Caltech101", "Caltech256")},
}


class TorchvisionSource:
    """A data set of torchvision by name, downloaded into its root unless it is there."""

    def __init__(self, task: TaskConfig, root: Path) -> None:
        name = (task.data or "").removeprefix(TORCHVISION).strip("/")
        if name not in DATA_SETS:
            raise UserError(f"task {task.name}: torchvision data set {name!r} is not known here; there are "
                            f"{', '.join(sorted(DATA_SETS))}")
        self._task, self._name, self._root = task, name, root
        self._made: dict[str, Any] = {}
        self.where = f"torchvision's {name} in {root}"

    @property
    def pools(self) -> tuple[str, ...]:
        """torchvision's own names of the splits."""
        return tuple(DATA_SETS[self._name][1])

    def _data_set(self, pool: str) -> Any:
        if pool not in self._made:
            import torchvision.datasets

            name, options = DATA_SETS[self._name]
            kind = getattr(torchvision.datasets, name)
            takes = inspect.signature(kind.__init__).parameters
            downloads = "download" in takes or ("kwargs" in takes and name != "ImageNet")
            arguments = options[pool] | ({"download": True} if downloads else {})
            try:
                self._root.mkdir(parents=True, exist_ok=True)
                with FileLock(str(self._root / f".{self._name}.lock")):  # other workers of this machine wait
                    self._made[pool] = kind(str(self._root), **arguments)
            except Exception as error:  # of the network, of a server, of an archive: torchvision has no common class
                raise UserError(f"task {self._task.name}: torchvision cannot get {self._name}: {error}. Put its files "
                                f"under {self._root} yourself, or give `root:`, where they are") from error
        return self._made[pool]

    @property
    def classes(self) -> tuple[str, ...]:
        """torchvision's class names, where it has them, unless the task gives them."""
        if self._task.classes is not None:
            return self._task.classes
        found = getattr(self._data_set(self.pools[0]), "classes", None)
        if not found:
            raise UserError(f"task {self._task.name}: torchvision has no class names for {self._name}; give them as "
                            f"`classes: [...]` of the task")
        # ImageNet has several names for a class; the first is the best known.
        return tuple(c if isinstance(c, str) else c[0] for c in found)

    def count(self, pool: str) -> int:
        """Images of the data set."""
        return len(self._data_set(pool))

    def rows(self, pool: str, wanted: Sequence[int]) -> Iterator[Row]:
        """Images in torchvision's order, opened one by one."""
        data_set = self._data_set(pool)
        for number in wanted:
            name = f"{self._name} {pool} image {number}".replace("  ", " ")
            try:
                image, label = data_set[number]
            except FileNotFoundError as error:
                raise UserError(f"task {self._task.name}: {name} is missing: {error}") from None
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                yield Row(name, error, 0)
            else:
                yield Row(name, image, int(label))
