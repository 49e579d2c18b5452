"""Labelled images in a folder per class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from raytvb.data.source import ROWS_AT_ONCE, Row, pools_of
from raytvb.errors import UserError
from raytvb.experiment.tasks import TaskConfig
from raytvb.storage.store import Store


class FolderSource:
    """Images in a folder per class, under folders named after the splits or without those.

    Classes are numbered in the order of their folders' names, over all splits.
    """

    def __init__(self, task: TaskConfig, store: Store, keys: Sequence[str]) -> None:
        self._task, self._store, self.where = task, store, store.url
        self._keys = pools_of(task, keys, lambda key: key.split("/")[0] if "/" in key else "")
        self._depth = 0 if "" in self._keys else 1
        outside = [k for k in keys if k.count("/") <= self._depth]
        if outside:
            raise UserError(
                f"task {task.name}: {store.where(outside[0])} is in no folder of a class (a folder tree is "
                f"CLASS/image.jpg or SPLIT/CLASS/image.jpg; splits are train, val and test)"
            )
        self._folders = sorted({self._folder(k) for k in keys})
        inner = [
            frozenset(k.split("/")[1] for k in keys if k.startswith(f"{f}/")) for f in self._folders
        ]
        if (
            not self._depth
            and len(inner) > 1
            and len(inner[0]) > 1
            and len(set(inner)) == 1
            and all(k.count("/") > 1 for k in keys)
        ):
            raise UserError(
                f"task {task.name}: {store.url} has the same folders ({', '.join(sorted(inner[0])[:3])}…) "
                f"in each of {', '.join(self._folders[:5])}: if these are splits, say which with "
                f"`splits: {{train: {self._folders[0]}, test: {self._folders[-1]}}}`"
            )
        if len(self._folders) == 1:
            raise UserError(
                f"task {task.name}: all images under {store.url} are in one class, {self._folders[0]}; "
                f"`data:` is the folder above those of the classes, or of the splits"
            )

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
            raise UserError(
                f"task {self._task.name}: {len(given)} `classes` are given, but {self.where} has "
                f"{len(self._folders)} folders of classes ({', '.join(self._folders[:5])}, …)"
            )
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
