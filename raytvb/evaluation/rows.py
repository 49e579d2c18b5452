"""The results of evaluations in a store: a Parquet file and its record for each evaluation.

Most evaluations count correct answers (`Row`). Disentanglement compares pairs of tasks (`PairRow`).
The identity in the record is how the rows were measured, such as the coefficients or the control.
The parents are the versions of vectors, bases and images that were measured. If one of them
changes, the evaluation is made again.

A store of format 1 has `evals/<name>.parquet` without a record, and the identity in the metadata of
the file. These files are read as they are, since there is nothing to compare them with.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from raytvb.experiment.layout import EVALS
from raytvb.maths.counts import Count
from raytvb.storage import records
from raytvb.storage.contract import JsonObject
from raytvb.storage.damage import DamagedError, unreadable
from raytvb.storage.parquet import parquet_bytes
from raytvb.storage.records import FileInfo, Record
from raytvb.storage.replacing import commit_over, new_tag, tagged
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreKeyError

_IDENTITY = b"raytvb"


@dataclass(frozen=True)
class Row:
    """Correct answers of one model on the images of one task."""

    model: str
    """What was measured: a candidate's name, `zero-shot`, `before`, `after` and so on."""
    split: str
    size: int
    """Number of tasks added. For an unseen task: number of coefficients learned. For an online
    basis: 1 for a task by itself, 0 for all tasks so far."""
    subset: int
    """Number of the subset among those of its size. For an online basis: number of tasks that have
    arrived. For an unseen task: number of training images."""
    task: str
    coefficient: float | None
    """None if the model has no single coefficient."""
    correct: int
    total: int

    @classmethod
    def of(
        cls,
        model: str,
        split: str,
        size: int,
        subset: int,
        task: str,
        coefficient: float | None,
        count: Count,
    ) -> Row:
        """The row of a count. The expected correct answers of the count are not kept."""
        return cls(model, split, size, subset, task, coefficient, count.correct, count.total)

    @property
    def count(self) -> Count:
        """Correct answers out of the images."""
        return Count(self.correct, self.total)

    @property
    def accuracy(self) -> float:
        """Share of correct answers, 0 to 1."""
        return self.count.accuracy


@dataclass(frozen=True)
class PairRow:
    """How many answers of a model with two tasks added differ from those with one task added."""

    model: str
    split: str
    first: str
    second: str
    alpha: float
    """Coefficient of the first task."""
    beta: float
    """Coefficient of the second task."""
    disagree: int
    """Images of both tasks with a different answer."""
    total: int
    """Images of both tasks."""
    error: float
    """Sum over the two tasks of the share of images with a different answer, 0 to 2."""


SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("split", pa.string()),
        ("size", pa.int64()),
        ("subset", pa.int64()),
        ("task", pa.string()),
        ("coefficient", pa.float64()),
        ("correct", pa.int64()),
        ("total", pa.int64()),
    ]
)
"""Columns of a file of `Row`."""

PAIR_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("split", pa.string()),
        ("first", pa.string()),
        ("second", pa.string()),
        ("alpha", pa.float64()),
        ("beta", pa.float64()),
        ("disagree", pa.int64()),
        ("total", pa.int64()),
        ("error", pa.float64()),
    ]
)
"""Columns of a file of `PairRow`."""

NO_PARENTS: Mapping[str, str] = MappingProxyType({})

AnyRow = TypeVar("AnyRow", Row, PairRow)


ROWS = "rows.parquet"
"""Name of the file in the folder of an evaluation. Rows that were written again have a tag in it.
"""


def rows_file(record: Record, where: str) -> FileInfo:
    """What the record of an evaluation says of its rows; `where` names the evaluation."""
    return record.file(_name(record), where)


def _name(record: Record) -> str:
    return next((name for name in record.files if name.startswith("rows")), ROWS)


def prefix(name: str) -> str:
    """Folder of an evaluation in the store."""
    return f"{EVALS}/{name}"


def _first_format_key(name: str) -> str:
    return f"{EVALS}/{name}.parquet"


def write_rows(
    store: Store,
    name: str,
    rows: Sequence[Row],
    identity: JsonObject,
    parents: Mapping[str, str] = NO_PARENTS,
) -> None:
    """Write the rows of an evaluation with its identity.

    parents: the versions that were measured, as checksums.
    """
    _write(store, name, rows, identity, parents, SCHEMA)


def write_pair_rows(
    store: Store,
    name: str,
    rows: Sequence[PairRow],
    identity: JsonObject,
    parents: Mapping[str, str] = NO_PARENTS,
) -> None:
    """Write the rows of a disentanglement evaluation, as `write_rows`."""
    _write(store, name, rows, identity, parents, PAIR_SCHEMA)


def _write(
    store: Store,
    name: str,
    rows: Sequence[Row] | Sequence[PairRow],
    identity: JsonObject,
    parents: Mapping[str, str],
    schema: pa.Schema,
) -> None:
    table = parquet_bytes([asdict(row) for row in rows], schema)
    files = {tagged(ROWS, new_tag(store, prefix(name), table)): table}
    commit_over(store, prefix(name), identity=identity, parents=parents, files=files)
    if records.is_first_format(store):
        store.delete(_first_format_key(name))  # rows with another identity


@dataclass(frozen=True)
class StoredRows:
    """Rows in the store that are not damaged."""

    identity: JsonObject
    record: Record | None
    """None in a store of format 1."""


def stored_rows(store: Store, name: str) -> StoredRows | None:
    """What the store says of the rows of an evaluation; None if they are missing or damaged."""
    try:
        record, data = _stored(store, name)
    except (DamagedError, StoreKeyError):
        return None
    if record is not None:
        return StoredRows(record.identity, record)
    identity = _first_format_identity(data)
    return None if identity is None else StoredRows(identity, None)


def check_whole(store: Store, name: str) -> None:
    """Raise DamagedError if the rows of an evaluation are there and damaged."""
    with suppress(StoreKeyError):
        _stored(store, name)


def has_rows(store: Store, name: str, identity: JsonObject | None = None) -> bool:
    """Whether the evaluation has been made; with this identity, if one is given.

    Rows that are damaged count as not made, so that the evaluation is made again.
    """
    stored = stored_rows(store, name)
    return stored is not None and (identity is None or identity == stored.identity)


def _first_format_identity(data: bytes) -> JsonObject | None:
    """The identity in the metadata of a file; None if the file is damaged or has none."""
    try:
        metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
        identity = json.loads(metadata.get(_IDENTITY, b"null"))
    except (pa.ArrowException, OSError, ValueError, RecursionError):
        return None
    return identity if isinstance(identity, dict) else None


def _stored(store: Store, name: str) -> tuple[Record | None, bytes]:
    """The record of an evaluation, which is None in a store of format 1, and its file.

    Raises StoreKeyError if it has not been made, and DamagedError if the file differs from the
    record.
    """
    record = records.find(store, prefix(name))
    if record is not None:
        return record, records.read_file(store, prefix(name), _name(record), record)
    if records.is_first_format(store):
        return None, store.read(_first_format_key(name))
    raise StoreKeyError(f"no such key: {store.where(prefix(name))}/{records.RECORD}")


def read_rows(store: Store, name: str) -> list[Row]:
    """The rows of an evaluation.

    Raises StoreKeyError if it has not been made, and DamagedError if its file is damaged.
    """
    return _read(store, name, Row, SCHEMA)


def read_pair_rows(store: Store, name: str) -> list[PairRow]:
    """The rows of a disentanglement evaluation. Raises the same errors as `read_rows`."""
    return _read(store, name, PairRow, PAIR_SCHEMA)


def _read(store: Store, name: str, row_type: type[AnyRow], schema: pa.Schema) -> list[AnyRow]:
    _, data = _stored(store, name)
    where = store.where(prefix(name))
    try:
        table = pq.read_table(io.BytesIO(data)).select(schema.names)
        rows = table.to_pylist()
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise unreadable(where, str(error)) from None
    if not table.schema.equals(schema):
        raise unreadable(where, f"its columns are {table.schema.types}")
    for column in schema.names:
        if column != "coefficient" and table[column].null_count:
            raise unreadable(where, f"it lacks values of {column}")
    return [row_type(**fields) for fields in rows]
