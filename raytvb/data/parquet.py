"""Labelled images in Parquet files."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from raytvb.data.source import KNOWN_POOLS, ROWS_AT_ONCE, Row, pools_of
from raytvb.errors import UserError
from raytvb.experiment.tasks import TaskConfig
from raytvb.storage.store import Store

_STREAM_BYTES = (
    2**20
)  # of a Parquet column: else a row group is held whole, and many files are one row group


_SHARD = re.compile(r"[-_.]?(\d+(-of-\d+)?(-[0-9a-f]{8,})?)?$")


class ParquetSource:
    """Parquet files named after their split (`train-00000-of-00002.parquet`) or in a folder of its
    name.
    """

    def __init__(self, task: TaskConfig, store: Store, keys: Sequence[str]) -> None:
        self._task, self._store, self.where = task, store, store.url
        self._keys = pools_of(task, keys, self._pool)
        for pool, found in self._keys.items():
            folders = sorted({self._configuration(k, pool) for k in found})
            if pool and len(folders) > 1:
                raise UserError(
                    f"task {task.name}: {store.url} has {pool} files in several folders "
                    f"({', '.join(f or '.' for f in folders)}); name one of them in `data:`"
                )

    @staticmethod
    def _pool(key: str) -> str:
        """train for `train-00000-of-00002.parquet`, `train.parquet` and `train/0000.parquet`."""
        folder, name = posixpath.split(key)
        stem = _SHARD.sub("", name.removesuffix(".parquet"))
        first = re.split(r"[-_.]", stem)[0]
        return first if first.lower() in KNOWN_POOLS else stem or posixpath.basename(folder)

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
        """Class names from the Hugging Face metadata of a pool's first file, unless the task gives
        them.
        """
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
        raise UserError(
            f"task {self._task.name}: {self.where} has no class names in its Parquet metadata; "
            f"give them as `classes: [...]` of the task"
        )

    @contextmanager
    def _open(self, key: str) -> Iterator[pq.ParquetFile]:
        """An open Parquet file. Raises UserError, naming task and file, for anything else."""
        place = f"task {self._task.name}: {self._store.where(key)}"
        with self._store.fs.open(self._store.path(key), "rb") as file:
            try:
                yield pq.ParquetFile(file, buffer_size=_STREAM_BYTES, pre_buffer=False)
            except pa.ArrowException as error:
                raise UserError(f"{place} is not a whole Parquet file: {error}") from None
            except (
                OSError
            ) as error:  # damaged pages, or a network that may recover: worth another try
                raise OSError(f"{place}: {error}") from error

    def count(self, pool: str) -> int:
        """Rows, from the files' footers."""
        total = 0
        for key in self._keys[pool]:
            with self._open(key) as parquet:
                total += parquet.metadata.num_rows
        return total

    def rows(self, pool: str, wanted: Sequence[int]) -> Iterator[Row]:
        """Rows in the order of the files' names; a few at a time are in memory, never a row
        group.
        """
        task, todo, before = self._task, set(wanted), 0
        for key in self._keys[pool]:
            with self._open(key) as parquet:
                missing = {task.image_column, task.label_column} - set(parquet.schema_arrow.names)
                if missing:
                    raise UserError(
                        f"task {task.name}: {key} has no column {', '.join(sorted(missing))}; it has "
                        f"{', '.join(parquet.schema_arrow.names)} (`image_column`, `label_column` name "
                        f"them)"
                    )
                number = 0
                for group in range(parquet.num_row_groups):
                    count = parquet.metadata.row_group(group).num_rows
                    if todo.isdisjoint(range(before + number, before + number + count)):
                        number += count
                        continue
                    for batch in parquet.iter_batches(
                        ROWS_AT_ONCE,
                        [group],
                        [task.image_column, task.label_column],
                        use_threads=False,
                    ):
                        for place in range(len(batch)):
                            if before + number in todo:
                                image, label = (
                                    batch.column(c)[place].as_py()
                                    for c in (task.image_column, task.label_column)
                                )
                                data = image.get("bytes") if isinstance(image, dict) else image
                                yield Row(f"{key} row {number}", data, label)
                            number += 1
                before += number
