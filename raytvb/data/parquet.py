"""Labelled images in Parquet files, as the CLIP task collections on the Hugging Face hub have them.

The image column holds `{bytes, path}` structs or bytes. The label column holds integers or names of
classes. Class names are in the `huggingface` entry of the Arrow schema's metadata. `parquet_files`
says which files are which split, `parquet_header` reads one file's header, and `class_names` makes
one list of classes of all files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from raytvb.data.class_names import ClassNames, class_names
from raytvb.data.image_source import BYTES_AT_ONCE, ROWS_AT_ONCE, Row
from raytvb.data.listing import Listing
from raytvb.data.parquet_files import check_files, parquet_pools
from raytvb.data.parquet_header import IMAGE_COLUMN, LABEL_COLUMN, Header, read_header
from raytvb.data.pools import split_pools
from raytvb.errors import UserError, described, listed, shortened
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.storage.store import Store

# Number of bytes of a Parquet column that are read at a time. By default a whole row group would be
# in memory, and many files are one row group.
_STREAM_BYTES = 2**20

_READERS = 16
"""Number of headers that are read from a server at the same time."""


class ParquetSource:
    """Parquet files named after their split (`train-00000-of-00002.parquet`), or in a folder that
    is named after it.
    """

    def __init__(
        self, task: TaskConfig, store: Store, keys: Sequence[str], listing: Listing
    ) -> None:
        """keys: the Parquet files of the store. listing: says what is left out.

        Raises UserError if the files of a split lie in several folders, if they overlap, and if one
        is missing that their names speak of.
        """
        self.where = store.url
        self.left_out = listing.left_out
        self._task = task
        self._store = store
        self._keys = parquet_pools(task, keys)
        self._used = sorted(set(split_pools(task, self.pools, self.where).values()))
        self._file_warnings = [*listing.warnings]
        for pool in self._used:
            self._file_warnings += check_files(task, self.where, pool, self._keys[pool])

    @property
    def pools(self) -> tuple[str, ...]:
        """The names of the files without their shard numbers, or the names of their folders."""
        return tuple(self._keys)

    @property
    def warnings(self) -> list[str]:
        """Files that seem to be missing, columns with other names, and class names in another
        order.
        """
        return [*self._file_warnings, *self._unusual_columns(), *self._classes.warnings]

    @cached_property
    def _headers(self) -> dict[str, Header]:
        """The headers of all files that may be used, by key."""
        keys = [key for pool in self._used for key in self._keys[pool]]
        with ThreadPoolExecutor(1 if self._store.is_local else _READERS) as pool:
            return dict(zip(keys, pool.map(self._header, keys), strict=True))

    def _header(self, key: str) -> Header:
        with self._open(key) as parquet:
            schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
        return read_header(self._task, key, schema, rows, self._place(key))

    def _unusual_columns(self) -> list[str]:
        lines = []
        for given, default, kind in (
            (self._task.image_column, IMAGE_COLUMN, "image"),
            (self._task.label_column, LABEL_COLUMN, "label"),
        ):
            found = {getattr(header.columns, kind) for header in self._headers.values()}
            if given == default and found != {default}:
                columns = " and ".join(sorted(found))
                lines.append(f"the {kind}s are taken from the column {columns}")
        return lines

    @cached_property
    def _classes(self) -> ClassNames:
        headers = [*self._headers.values()]
        classes = class_names(self._task, headers, self.where)
        if classes is not None:
            return classes
        texts = [header for header in headers if header.has_texts]
        seen = f"; its labels are texts, such as {self._some_labels(texts[0])}" if texts else ""
        raise UserError(
            f"task {self._task.name}: {self.where} has no class names in its Parquet metadata"
            f"{seen}; give them as `classes: [...]` of the task"
        )

    def _some_labels(self, header: Header) -> str:
        """The first few different labels of a file."""
        with self._open(header.key) as parquet:
            columns = [header.columns.label]
            for batch in parquet.iter_batches(1000, columns=columns, use_threads=False):
                labels = dict.fromkeys(batch.column(0).to_pylist())
                return listed((shortened(label) for label in labels), 5)
        return "none"

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names that the task gives; else those in the Hugging Face metadata of the
        files. Raises UserError if there are none, and if files have different ones.
        """
        return self._classes.names

    def _place(self, key: str) -> str:
        return f"task {self._task.name}: {self._store.where(key)}"

    @contextmanager
    def _open(self, key: str) -> Iterator[pq.ParquetFile]:
        """An open Parquet file. Raises UserError that names task and file for any other file.

        An OSError is raised again with task and file. It means damaged pages, or a network that may
        recover, so it is worth another try.
        """
        place = self._place(key)
        with self._store.open(key) as file:
            try:
                yield pq.ParquetFile(file, buffer_size=_STREAM_BYTES, pre_buffer=False)
            except OSError as error:
                raise OSError(f"{place}: {error}; if that stays so, get the file again") from error
            # Of damaged files, pyarrow raises errors of Python's own kinds, too.
            except (pa.ArrowException, ValueError, KeyError, OverflowError) as error:
                raise UserError(
                    f"{place} is not a whole Parquet file: get it again, or move it away "
                    f"({described(error):.200})"
                ) from None

    def count(self, pool: str) -> int:
        """Number of rows, from the files' footers."""
        total = 0
        for key in self._keys[pool]:
            if key in self._headers:
                total += self._headers[key].rows
                continue
            with self._open(key) as parquet:
                total += parquet.metadata.num_rows
        return total

    def labels(self, pool: str, positions: Sequence[int]) -> Iterator[object]:
        """The labels of the rows at these positions. Of the files, only their column is read."""
        for _, _, label in self._chosen(pool, positions, with_images=False):
            yield label

    def rows(self, pool: str, positions: Sequence[int]) -> Iterator[Row]:
        """The rows at these positions, in the order of the files' names.

        Only a few rows are in memory at a time, never a whole row group.
        """
        for name, image, label in self._chosen(pool, positions, with_images=True):
            data = image.get("bytes") if isinstance(image, dict) else image
            yield Row(name, data, label)

    def _chosen(
        self, pool: str, positions: Sequence[int], *, with_images: bool
    ) -> Iterator[tuple[str, object, object]]:
        """Name, image and label of the rows at these positions; the images only if wanted."""
        wanted = set(positions)
        first = 0  # position in the pool of the file's first row
        for key in self._keys[pool]:
            header = self._headers[key]
            with self._open(key) as parquet:
                for number, image, label in _file_rows(parquet, header, first, wanted, with_images):
                    name = f"{key} row {number}"
                    yield name, image, self._class_number(key, name, label)
            first += header.rows

    def _class_number(self, key: str, name: str, label: object) -> object:
        """The number in `classes` of a label of a file. What is none is returned as it is.

        Raises UserError for a number that the file's own class names do not have.
        """
        if isinstance(label, str):
            return self._classes.places.get(label, label)
        numbers = self._classes.numbers.get(key)
        if numbers is None or not isinstance(label, int):
            return label
        if 0 <= label < len(numbers):
            return numbers[label]
        hint = " (-1 marks images without a label)" if label == -1 else ""
        raise UserError(
            f"task {self._task.name}: {name} has label {label}{hint}, but the file names "
            f"{len(numbers)} classes, from 0 to {len(numbers) - 1}: remove such rows, or name "
            f"other splits with `splits:`"
        )


def _file_rows(
    parquet: pq.ParquetFile, header: Header, first: int, wanted: set[int], with_images: bool
) -> Iterator[tuple[int, object, object]]:
    """Number, image and label of the rows of a file whose positions in the pool are in `wanted`.

    first: the position of the file's row 0. Row groups without a wanted row are not read.
    """
    label, image = header.columns.label, header.columns.image
    columns = [image, label] if with_images else [label]
    number = 0
    for group in range(parquet.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        if wanted.isdisjoint(range(first + number, first + number + count)):
            number += count
            continue
        at_once = _rows_at_once(parquet.metadata.row_group(group)) if with_images else ROWS_AT_ONCE
        for batch in parquet.iter_batches(at_once, [group], columns, use_threads=False):
            images = batch.column(image) if with_images else None
            labels = batch.column(label)
            for index in range(len(batch)):
                if first + number in wanted:
                    picture = None if images is None else images[index].as_py()
                    yield number, picture, labels[index].as_py()
                number += 1


def _rows_at_once(group: pq.RowGroupMetaData) -> int:
    """Number of rows of a row group that are read together: few if the images are large."""
    rows, size = int(group.num_rows), int(group.total_byte_size)
    return max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE * rows // max(1, size)))
