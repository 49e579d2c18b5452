"""Labelled images in folders, one folder for each class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence

from raytvb.data.image_source import (
    BYTES_AT_ONCE,
    ROWS_AT_ONCE,
    USUAL_POOLS,
    Row,
    check_classes,
    check_given_classes,
)
from raytvb.data.listing import Listing
from raytvb.data.opening import RefusedImageError
from raytvb.data.pools import keys_by_pool, means_split, split_pools, splits_hint
from raytvb.errors import UserError, listed, shown
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.storage.store import Store

BESIDE = "."
"""The pool of images that lie beside the split folders."""

MOST_BYTES = 2**28
"""Size of an image file. An image of the most pixels that are allowed has less."""


class FolderSource:
    """Images in one folder for each class: CLASS/image.jpg, or SPLIT/CLASS/image.jpg.

    Classes are numbered in the order of their folders' names, over the folders of all splits.
    """

    def __init__(
        self,
        task: TaskConfig,
        store: Store,
        keys: Sequence[str],
        others: Sequence[str],
        listing: Listing,
    ) -> None:
        """keys: the image files of the store. others: its other files. listing: says what is left
        out.

        Raises UserError if an image of a split is not in a class folder, if the folders look like
        splits with unknown names, if there is only one class, and for given names that contradict
        the folders.
        """
        self.where = store.url
        self.left_out = listing.left_out
        self._task = task
        self._store = store
        self._sizes = listing.sizes
        self._keys = folder_pools(task, keys)
        self._depth = 0 if tuple(self._keys) == ("",) else 1
        self._used = set(split_pools(task, self.pools, self.where).values())
        used = [key for pool in sorted(self._used) for key in self._keys[pool]]
        self._check_all_in_class_folders(used)
        self._folders = sorted({self._class_folder(key) for key in used})
        if self._depth == 0:
            self._check_folders_are_no_splits(used)
        self._check_folders_are_classes()
        self.warnings = [*listing.warnings, *self._folders_without_images(others)]
        if self._depth == 0:
            self.warnings += _classes_like_splits(self._folders)

    def _class_folder(self, key: str) -> str:
        return key.split("/")[self._depth]

    def _check_all_in_class_folders(self, keys: Sequence[str]) -> None:
        for key in keys:
            if key.count("/") <= self._depth:
                place = shown(self._store.where(key))
                raise UserError(
                    f"task {self._task.name}: {place} is not in a class folder (a folder tree is "
                    f"CLASS/image.jpg or SPLIT/CLASS/image.jpg; splits are train, val and test): "
                    f"move it into the folder of its class, or away"
                )

    def _check_folders_are_no_splits(self, keys: Sequence[str]) -> None:
        """Raise UserError if the folders are probably splits: if their names say so, or if each
        contains some of the same folders, which are then the classes.

        Names that the task gives for all of these folders say that they are classes.
        """
        if len(self._folders) == 1:
            return
        inner: dict[str, set[str]] = {folder: set() for folder in self._folders}
        has_images = set()
        for key in keys:
            upper, *rest = key.split("/")
            if len(rest) < 2:
                has_images.add(upper)
            else:
                inner[upper].add(rest[0])
        place = f"task {self._task.name}: {self.where}"
        if not has_images and all(map(means_split, set[str]().union(*inner.values()))):
            raise UserError(
                f"{place} has the splits in the folders of the classes "
                f"({_example(inner)}): move the images to SPLIT/CLASS/image.jpg"
            )
        if len(self._task.classes or ()) == len(self._folders):
            return
        like_splits = [folder for folder in self._folders if means_split(folder)]
        largest = max(inner.values(), key=len)
        are_same = not has_images and len(largest) > 1
        are_same = are_same and all(names <= largest for names in inner.values())
        are_nested = any(inner[folder] for folder in like_splits)
        if are_same or (len(like_splits) > 1 and (are_nested or like_splits == self._folders)):
            raise UserError(
                f"{place} has the folders {listed(self._folders, 5)}, which look like splits "
                f"({_example(inner)}): say which they are with {splits_hint(like_splits)}, or give "
                f"the names of {len(self._folders)} classes as `classes:` if they are classes"
            )

    def _check_folders_are_classes(self) -> None:
        if len(self._folders) == 1:
            raise UserError(
                f"task {self._task.name}: all images under {self.where} are in one class, "
                f"{self._folders[0]}; `data:` must be the folder above the class folders, or above "
                f"the split folders"
            )
        if self._task.classes is None:
            check_classes(self._task, self._folders, self.where)
        else:
            check_given_classes(self._task, self._folders, f"{self.where}, by its folders,")

    def _folders_without_images(self, others: Sequence[str]) -> list[str]:
        """A warning if there are folders beside the classes that hold files, but no image."""
        known, empty = set(self._folders), Counter[str]()
        for key in others:
            upper = key.split("/")
            is_below = self._depth == 0 or upper[0].lower() in USUAL_POOLS or upper[0] in self._used
            if len(upper) > self._depth + 1 and is_below and upper[self._depth] not in known:
                empty[upper[self._depth]] += 1
        if not empty:
            return []
        found = listed(f"{name} ({count:,} files)" for name, count in sorted(empty.items()))
        return [f"these folders have no image that can be read, so they are no classes: {found}"]

    @property
    def pools(self) -> tuple[str, ...]:
        """The upper folders if one of them has the name of a split, else ''."""
        return tuple(self._keys)

    @property
    def classes(self) -> tuple[str, ...]:
        """The folders' names, or the names that the task gives, one for each folder in order."""
        return self._task.classes or tuple(self._folders)

    def count(self, pool: str) -> int:
        """Number of files in a pool that have the ending of an image."""
        return len(self._keys[pool])

    def labels(self, pool: str, positions: Sequence[int]) -> Iterator[int]:
        """The numbers of the class folders of the files at these positions."""
        labels = {folder: label for label, folder in enumerate(self._folders)}
        for position in positions:
            yield labels[self._class_folder(self._keys[pool][position])]

    def rows(self, pool: str, positions: Sequence[int]) -> Iterator[Row]:
        """The files at these positions, in the order of their names, read a few at a time."""
        labels = self.labels(pool, positions)
        keys = [self._keys[pool][position] for position in positions]
        for batch in self._batches(keys):
            if self._size(batch[0]) > MOST_BYTES:
                yield Row(shown(batch[0]), _too_large(self._size(batch[0])), next(labels))
                continue
            for key, data in zip(batch, self._store.read_many(batch), strict=True):
                yield Row(shown(key), data, next(labels))

    def _batches(self, keys: Sequence[str]) -> Iterator[list[str]]:
        """The keys in batches of a few files and bytes. A file that is too large is alone."""
        batch, total = list[str](), 0
        for key in keys:
            size = self._size(key)
            if batch and (len(batch) == ROWS_AT_ONCE or total + size > BYTES_AT_ONCE):
                yield batch
                batch, total = [], 0
            batch.append(key)
            total += size
        if batch:
            yield batch

    def _size(self, key: str) -> int:
        """Bytes of a file; 0 if that is not known, or if the file is gone by now."""
        if not self._store.is_local:
            return self._sizes.get(key, 0)
        try:
            return os.stat(f"{self._store.path('').rstrip('/')}/{key}").st_size
        except OSError:
            return 0


def folder_pools(task: TaskConfig, keys: Sequence[str]) -> dict[str, list[str]]:
    """Image files by their pool: the upper folder if one has the name of a split, else ''.

    If the images lie in the upper folders themselves, and most of these have no name of a split,
    all of them are classes: one may be called `train` or `test`.
    """
    uppers = {_upper_folder(key) for key in keys}
    is_flat = all(key.count("/") == 1 for key in keys)
    named = {task.splits.train, task.splits.val, task.splits.test} & uppers
    if is_flat and not named and len([name for name in uppers if not means_split(name)]) > 1:
        return {"": list(keys)}
    return keys_by_pool(task, keys, _upper_folder)


def _upper_folder(key: str) -> str:
    folder, slash, _ = key.partition("/")
    return folder if slash else BESIDE


def _classes_like_splits(folders: Sequence[str]) -> list[str]:
    """A warning if classes have the name of a split."""
    names = [name for name in folders if name.lower() in USUAL_POOLS]
    if not names:
        return []
    return [f"the folders {listed(names)} are taken as classes, as all images lie in one level"]


def _example(inner: dict[str, set[str]]) -> str:
    """A few folders and what is in them: `a/train, a/test, b/train`."""
    pairs = [f"{upper}/{name}" for upper in sorted(inner) for name in sorted(inner[upper])]
    return listed(pairs or sorted(inner), 4)


def _too_large(size: int) -> RefusedImageError:
    return RefusedImageError(
        f"the file has {size:,} bytes, and an image file at most {MOST_BYTES:,}",
        f"files larger than {MOST_BYTES // 2**20} MB",
    )
