"""Labelled images in folders, one folder for each class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from raytvb.data.image_source import (
    ROWS_AT_ONCE,
    USUAL_POOLS,
    Row,
    check_classes,
    check_given_classes,
    keys_by_pool,
)
from raytvb.data.listing import Listing
from raytvb.errors import UserError, listed, shown
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.storage.store import Store


class FolderSource:
    """Images in one folder for each class: CLASS/image.jpg, or SPLIT/CLASS/image.jpg.

    Classes are numbered in the order of their folders' names, over all splits.
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

        Raises UserError if an image is not in a class folder, if the folders look like splits with
        unknown names, if there is only one class, and for given names that contradict the folders.
        """
        self.where = store.url
        self.left_out = listing.left_out
        self._task = task
        self._store = store
        self._keys = keys_by_pool(task, keys, _upper_folder)
        self._depth = 0 if "" in self._keys else 1
        self._check_all_in_class_folders(keys)
        self._folders = sorted({self._class_folder(key) for key in keys})
        if self._depth == 0:
            self._check_folders_are_no_splits(keys)
        self._check_folders_are_classes()
        self.warnings = [*listing.warnings, *self._folders_without_images(others)]

    def _class_folder(self, key: str) -> str:
        return key.split("/")[self._depth]

    def _check_all_in_class_folders(self, keys: Sequence[str]) -> None:
        for key in keys:
            if key.count("/") <= self._depth:
                place = shown(self._store.where(key))
                raise UserError(
                    f"task {self._task.name}: {place} is not in a class folder (a folder tree is "
                    f"CLASS/image.jpg or SPLIT/CLASS/image.jpg; splits are train, val and test)"
                )

    def _check_folders_are_no_splits(self, keys: Sequence[str]) -> None:
        """Raise UserError if all folders contain the same two or more folders.

        Then the inner folders are probably the classes, and the upper folders the splits.
        """
        inner: dict[str, set[str]] = {}
        for key in keys:
            upper, *rest = key.split("/")
            if len(rest) < 2:
                return  # images lie directly in the upper folder
            inner.setdefault(upper, set()).add(rest[0])
        classes = inner[self._folders[0]]
        if len(inner) == 1 or len(classes) == 1 or any(c != classes for c in inner.values()):
            return
        raise UserError(
            f"task {self._task.name}: {self.where} has the same folders "
            f"({', '.join(sorted(classes)[:3])}…) in each of {', '.join(self._folders[:5])}: if "
            f"these are splits, say which with "
            f"`splits: {{train: {self._folders[0]}, test: {self._folders[-1]}}}`"
        )

    def _check_folders_are_classes(self) -> None:
        if len(self._folders) == 1:
            raise UserError(
                f"task {self._task.name}: all images under {self.where} are in one class, "
                f"{self._folders[0]}; `data:` must be the folder above the class folders, or above "
                f"the split folders"
            )
        check_classes(self._task, self.classes, self.where)
        if self._task.classes is not None:
            check_given_classes(self._task, self._folders, f"{self.where}, by its folders,")

    def _folders_without_images(self, others: Sequence[str]) -> list[str]:
        """A warning if there are folders beside the classes that hold files, but no image."""
        known, empty = set(self._folders), Counter[str]()
        for key in others:
            upper = key.split("/")
            is_below = self._depth == 0 or upper[0].lower() in USUAL_POOLS or upper[0] in self._keys
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
        keys = iter([self._keys[pool][position] for position in positions])
        while batch := list(islice(keys, ROWS_AT_ONCE)):
            for key, data in zip(batch, self._store.read_many(batch), strict=True):
                yield Row(shown(key), data, next(labels))


def _upper_folder(key: str) -> str:
    folder, slash, _ = key.partition("/")
    return folder if slash else ""
