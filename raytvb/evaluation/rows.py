"""Evaluations in a store: Parquet files of counts, each written as one object, so that it is there
whole or not at all.

What a file depends on beside the experiment's frozen part (coefficients, the control …) is in its
metadata: an evaluation that was made with something else is made again.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytvb.errors import UserError
from raytvb.maths.counts import Count
from raytvb.storage.store import Store
from raytvb.storage.tables import parquet_bytes

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


_IDENTITY = b"raytvb"


def row(
    model: str, split: str, size: int, subset: int, task: str, alpha: float | None, count: Count
) -> dict[str, Any]:
    """One row: `correct` of `total` images of a task's split, for a model with a subset of `size`
    tasks added.

    alpha: None where there is no one coefficient.
    """
    return {
        "model": model,
        "split": split,
        "size": size,
        "subset": subset,
        "task": task,
        "coefficient": alpha,
        "correct": count.correct,
        "total": count.total,
    }


def key(name: str) -> str:
    """Where an evaluation lies."""
    return f"evals/{name}.parquet"


def write_rows(
    store: Store,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    identity: Mapping[str, Any],
    schema: pa.Schema = SCHEMA,
) -> None:
    """Write an evaluation, with what it depends on."""
    store.write(key(name), parquet_bytes(rows, schema.with_metadata({_IDENTITY: _json(identity)})))


def _json(identity: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(identity), sort_keys=True).encode()


def has_rows(store: Store, name: str, identity: Mapping[str, Any] | None = None) -> bool:
    """The evaluation has been done, with that identity where one is given."""
    if not store.exists(key(name)):
        return False
    if identity is None:
        return True
    try:
        metadata = pq.read_table(io.BytesIO(store.read(key(name)))).schema.metadata or {}
    except (pa.ArrowException, OSError):
        return False  # damaged: it is made again
    return bool(metadata.get(_IDENTITY) == _json(identity))


def read_rows(store: Store, name: str) -> list[dict[str, Any]]:
    """The rows of an evaluation. Raises UserError that names a damaged file."""
    data = store.read(key(name))
    try:
        found: list[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{store.where(key(name))} is damaged ({error}): `raytvb evaluate` makes it again"
        ) from None
    return found
