"""The results of evaluations in a store: one Parquet file for each evaluation.

Most evaluations count correct answers (`Row`). Disentanglement compares pairs of tasks (`PairRow`).
A file is written as one object, so it is either whole or absent. Its metadata hold the identity of
the evaluation: everything that the rows depend on, such as coefficients or the control, apart from
the frozen part of the experiment. If the identity changes, the evaluation is made again.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from raytvb.errors import UserError
from raytvb.maths.counts import Count
from raytvb.storage.contract import JsonObject
from raytvb.storage.parquet import parquet_bytes
from raytvb.storage.store import Store

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

AnyRow = TypeVar("AnyRow", Row, PairRow)


def key(name: str) -> str:
    """Key of an evaluation's file in the store."""
    return f"evals/{name}.parquet"


def write_rows(store: Store, name: str, rows: Sequence[Row], identity: JsonObject) -> None:
    """Write the rows of an evaluation with its identity."""
    _write(store, name, rows, identity, SCHEMA)


def write_pair_rows(store: Store, name: str, rows: Sequence[PairRow], identity: JsonObject) -> None:
    """Write the rows of a disentanglement evaluation with its identity."""
    _write(store, name, rows, identity, PAIR_SCHEMA)


def _write(
    store: Store,
    name: str,
    rows: Sequence[Row] | Sequence[PairRow],
    identity: JsonObject,
    schema: pa.Schema,
) -> None:
    described = schema.with_metadata({_IDENTITY: _identity_bytes(identity)})
    store.write(key(name), parquet_bytes([asdict(row) for row in rows], described))


def _identity_bytes(identity: JsonObject) -> bytes:
    return json.dumps(identity, sort_keys=True).encode()


def has_rows(store: Store, name: str, identity: JsonObject | None = None) -> bool:
    """Whether the evaluation has been made; with this identity, if one is given."""
    if identity is None:
        return store.exists(key(name))
    data = store.find(key(name))
    if data is None:
        return False
    try:
        metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
    except (pa.ArrowException, OSError):
        return False  # a damaged file: the evaluation is made again
    return bool(metadata.get(_IDENTITY) == _identity_bytes(identity))


def read_rows(store: Store, name: str) -> list[Row]:
    """The rows of an evaluation.

    Raises StoreKeyError if it has not been made, and UserError if its file is damaged.
    """
    return _read(store, name, Row, SCHEMA)


def read_pair_rows(store: Store, name: str) -> list[PairRow]:
    """The rows of a disentanglement evaluation. Raises the same errors as `read_rows`."""
    return _read(store, name, PairRow, PAIR_SCHEMA)


def _read(store: Store, name: str, row_type: type[AnyRow], schema: pa.Schema) -> list[AnyRow]:
    data = store.read(key(name))
    try:
        table = pq.read_table(io.BytesIO(data)).select(schema.names)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(
            f"{store.where(key(name))} is damaged ({error}): `raytvb evaluate` makes it again"
        ) from None
    return [row_type(**fields) for fields in table.to_pylist()]
