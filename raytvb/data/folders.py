"""Labelled images in folders, one folder for each class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from raytvb.data.image_source import ROWS_AT_ONCE, Row, keys_by_pool
from raytvb.errors import UserError
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.storage.store import Store

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Endings of the files in class folders that are read as images."""


class FolderSource:
    """Images in one folder for each class: CLASS/image.jpg, or SPLIT/CLASS/image.jpg.

    Classes are numbered in the order of their folders' names, over all splits.
    """

    def __init__(self, task: TaskConfig, store: Store, keys: Sequence[str]) -> None:
        """keys: the image files of the store.

        Raises UserError if an image is not in a class folder, if the folders look like splits with
        unknown names, and if there is only one class.
        """
        self.where = store.url
        self._task = task
        self._store = store
        self._keys = keys_by_pool(task, keys, _upper_folder)
        self._depth = 0 if "" in self._keys else 1
        self._check_all_in_class_folders(keys)
        self._folders = sorted({self._class_folder(key) for key in keys})
        if self._depth == 0:
            self._check_folders_are_no_splits(keys)
        if len(self._folders) == 1:
            raise UserError(
                f"task {task.name}: all images under {store.url} are in one class, "
                f"{self._folders[0]}; `data:` must be the folder above the class folders, or above "
                f"the split folders"
            )

    def _class_folder(self, key: str) -> str:
        return key.split("/")[self._depth]

    def _check_all_in_class_folders(self, keys: Sequence[str]) -> None:
        for key in keys:
            if key.count("/") <= self._depth:
                raise UserError(
                    f"task {self._task.name}: {self._store.where(key)} is not in a class folder "
                    f"(a folder tree is CLASS/image.jpg or SPLIT/CLASS/image.jpg; splits are "
                    f"train, val and test)"
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

    @property
    def pools(self) -> tuple[str, ...]:
        """The upper folders if one of them has the name of a split, else ''."""
        return tuple(self._keys)

    @property
    def classes(self) -> tuple[str, ...]:
        """The folders' names, or the names that the task gives, one for each folder in order.

        Raises UserError if the task gives another number of names.
        """
        given = self._task.classes
        if given is None:
            return tuple(self._folders)
        if len(given) != len(self._folders):
            raise UserError(
                f"task {self._task.name}: {len(given)} `classes` are given, but {self.where} has "
                f"{len(self._folders)} folders of classes ({', '.join(self._folders[:5])}, …)"
            )
        return given

    def count(self, pool: str) -> int:
        """Number of files in a pool that have the ending of an image."""
        return len(self._keys[pool])

    def rows(self, pool: str, positions: Sequence[int]) -> Iterator[Row]:
        """The files at these positions, in the order of their names, read a few at a time."""
        labels = {folder: label for label, folder in enumerate(self._folders)}
        keys = iter([self._keys[pool][position] for position in positions])
        while batch := list(islice(keys, ROWS_AT_ONCE)):
            for key, data in zip(batch, self._store.read_many(batch), strict=True):
                yield Row(key, data, labels[self._class_folder(key)])


def _upper_folder(key: str) -> str:
    folder, slash, _ = key.partition("/")
    return folder if slash else ""
