"""Parquet tables in a store."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def parquet_bytes(rows: Sequence[Mapping[str, object]], schema: pa.Schema | None = None) -> bytes:
    """Rows as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(r) for r in rows], schema=schema), buffer)
    return buffer.getvalue()
