"""Row files of the Gram matrix: where they are, what they say, and their checksum.

This module needs neither torch nor numpy, so that `verify` can check row files.
"""

from __future__ import annotations

import hashlib
import json

from raytvb.errors import VectorError
from raytvb.storage.contract import Contract, JsonObject, parse_json
from raytvb.storage.damage import unreadable
from raytvb.storage.format_version import format_problem

PREFIX = "gram"
"""Folder of the Gram matrix in a store."""

OWNER = f"{PREFIX}/owner.json"
"""Key of the file that says which writer may write."""

ROWS = f"{PREFIX}/rows"
"""Folder of the row files."""


class Arrival(Contract):
    """How good bases could be after some vectors had arrived."""

    vectors: int
    """Number of vectors that had arrived."""
    floor: dict[int, float]
    """Least relative squared error of any basis, by its size M."""


class RowsInfo(Contract):
    """Metadata of a row file."""

    chain: str
    """`GramState.chain` of the vectors before the new ones."""
    vectors: tuple[tuple[str, str], ...]
    """Tasks and checksums of the new vectors."""
    history: tuple[Arrival, ...]
    sha256: str = ""
    """Checksum over the other fields and the rows."""

    def checksum(self, rows: bytes) -> str:
        """The value that `sha256` must have. rows: (new, T + new) float64, row by row."""
        fields = self.to_json()
        del fields["sha256"]
        text = json.dumps(fields, sort_keys=True).encode()
        return hashlib.sha256(text + rows).hexdigest()


def check_rows(data: bytes, where: str) -> RowsInfo:
    """Metadata of a row file, compared with all its bytes; `where` names the file.

    Raises DamagedError if the file is damaged, and VectorError for a format that this raytvb does
    not know.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = parse_json(data[8:start], where)
    fields = _metadata(header, where)
    problem = format_problem(fields, where)
    if problem is not None:
        raise VectorError(problem.reason, problem.remedy)
    info = RowsInfo.from_json(fields, where)
    is_whole = _describes(header, len(data) - start, len(info.vectors))
    if not is_whole or info.sha256 != info.checksum(data[start:]):
        raise unreadable(where, "its contents have changed since it was written")
    return info


def _describes(header: object, size: int, new: int) -> bool:
    """Whether the header, which the checksum does not cover, is that of `size` bytes of `new` rows.

    A row file has no tensor but its rows, which are float64.
    """
    if not isinstance(header, dict) or header.keys() != {"__metadata__", "rows"}:
        return False
    match header["rows"]:
        case {"dtype": "F64", "shape": [int(rows), int(columns)], "data_offsets": [0, int(end)]}:
            return rows == new and end == size == 8 * rows * columns
    return False


def _metadata(header: object, where: str) -> JsonObject:
    """Our metadata in the header of a safetensors file."""
    match header:
        case {"__metadata__": {"raytvb": str(text)}}:
            fields = parse_json(text, where)
        case _:
            fields = None
    if not isinstance(fields, dict):
        raise unreadable(where, "it has no `raytvb` metadata")
    return fields
