"""Labelled images in Parquet files, as the CLIP task collections on the Hugging Face hub have them.

The image column holds `{bytes, path}` structs or bytes. The label column holds integers. Class
names are in the `huggingface` entry of the Arrow schema's metadata.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from raytvb.data.image_source import ROWS_AT_ONCE, USUAL_POOLS, Row, keys_by_pool
from raytvb.errors import UserError
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.storage.store import Store

# Number of bytes of a Parquet column that are read at a time. By default a whole row group would be
# in memory, and many files are one row group.
_STREAM_BYTES = 2**20

_SHARD = re.compile(r"[-_.]?(\d+(-of-\d+)?(-[0-9a-f]{8,})?)?$")


class ParquetSource:
    """Parquet files named after their split (`train-00000-of-00002.parquet`), or in a folder that
    is named after it.
    """

    def __init__(self, task: TaskConfig, store: Store, keys: Sequence[str]) -> None:
        """keys: the Parquet files of the store.

        Raises UserError if the files of a split lie in several folders.
        """
        self.where = store.url
        self._task = task
        self._store = store
        self._keys = keys_by_pool(task, keys, _pool_of)
        for pool, pool_keys in self._keys.items():
            folders = sorted({_folder_above(key, pool) for key in pool_keys})
            if pool and len(folders) > 1:
                names = ", ".join(folder or "." for folder in folders)
                raise UserError(
                    f"task {task.name}: {store.url} has {pool} files in several folders ({names}); "
                    f"name one of them in `data:`"
                )

    @property
    def pools(self) -> tuple[str, ...]:
        """The names of the files without their shard numbers, or the names of their folders."""
        return tuple(self._keys)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The class names that the task gives; else those in the Hugging Face metadata of the first
        pool that has class names. Raises UserError if there are none.
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
        """An open Parquet file. Raises UserError that names task and file for any other file.

        An OSError is raised again with task and file. It means damaged pages, or a network that may
        recover, so it is worth another try.
        """
        place = f"task {self._task.name}: {self._store.where(key)}"
        with self._store.open(key) as file:
            try:
                yield pq.ParquetFile(file, buffer_size=_STREAM_BYTES, pre_buffer=False)
            except pa.ArrowException as error:
                raise UserError(f"{place} is not a whole Parquet file: {error}") from None
            except OSError as error:
                raise OSError(f"{place}: {error}") from error

    def count(self, pool: str) -> int:
        """Number of rows, from the files' footers."""
        total = 0
        for key in self._keys[pool]:
            with self._open(key) as parquet:
                total += parquet.metadata.num_rows
        return total

    def rows(self, pool: str, positions: Sequence[int]) -> Iterator[Row]:
        """The rows at these positions, in the order of the files' names.

        Only a few rows are in memory at a time, never a whole row group.
        """
        wanted = set(positions)
        first = 0  # position in the pool of the file's first row
        for key in self._keys[pool]:
            with self._open(key) as parquet:
                self._check_columns(key, parquet)
                yield from self._file_rows(key, parquet, first, wanted)
                first += parquet.metadata.num_rows

    def _check_columns(self, key: str, parquet: pq.ParquetFile) -> None:
        task, columns = self._task, parquet.schema_arrow.names
        missing = {task.image_column, task.label_column} - set(columns)
        if missing:
            raise UserError(
                f"task {task.name}: {key} has no column {', '.join(sorted(missing))}; it has "
                f"{', '.join(columns)} (`image_column`, `label_column` name them)"
            )

    def _file_rows(
        self, key: str, parquet: pq.ParquetFile, first: int, wanted: set[int]
    ) -> Iterator[Row]:
        """The rows of a file whose positions in the pool are in `wanted`.

        first: the position of the file's row 0. Row groups without a wanted row are not read.
        """
        columns = [self._task.image_column, self._task.label_column]
        number = 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if wanted.isdisjoint(range(first + number, first + number + count)):
                number += count
                continue
            for batch in parquet.iter_batches(ROWS_AT_ONCE, [group], columns, use_threads=False):
                for index in range(len(batch)):
                    if first + number in wanted:
                        image = batch.column(columns[0])[index].as_py()
                        label = batch.column(columns[1])[index].as_py()
                        data = image.get("bytes") if isinstance(image, dict) else image
                        yield Row(f"{key} row {number}", data, label)
                    number += 1


def _pool_of(key: str) -> str:
    """The pool of a file: train for `train-00000-of-00002.parquet`, `train.parquet` and
    `train/0000.parquet`.
    """
    folder, name = posixpath.split(key)
    stem = _SHARD.sub("", name.removesuffix(".parquet"))
    first_word = re.split(r"[-_.]", stem)[0]
    if first_word.lower() in USUAL_POOLS:
        return first_word
    return stem or posixpath.basename(folder)


def _folder_above(key: str, pool: str) -> str:
    """The folder of a configuration of the data set: the folder above the pool's own folder, or the
    file's folder if the pool has none.
    """
    folder = posixpath.dirname(key)
    return posixpath.dirname(folder) if posixpath.basename(folder).lower() == pool else folder
