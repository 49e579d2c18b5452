"""JSON files that carry their own checksum, so that a changed bit is noticed when they are read.

The field `sha256` is the checksum of the file's bytes without that field, and `format` says which
raytvb wrote it. Files of format 1 have no checksum.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable

from pydantic import JsonValue

from raytvb.errors import UserError
from raytvb.storage.contract import JsonObject, parse_json
from raytvb.storage.damage import DamagedError, unreadable
from raytvb.storage.format_version import FORMAT, format_problem

SEAL = "sha256"


def json_bytes(fields: JsonValue) -> bytes:
    """The file of a JSON value; equal values give equal bytes.

    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    text = json.dumps(fields, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    return f"{text}\n".encode()


def sealed(fields: JsonObject) -> bytes:
    """The file of these fields with a format and a checksum. Raises as `json_bytes`."""
    content: JsonObject = {**fields, "format": FORMAT}
    return json_bytes({**content, SEAL: hashlib.sha256(json_bytes(content)).hexdigest()})


def not_finite(value: JsonValue, path: str = "") -> str | None:
    """The first number that is NaN or infinite, with its place, as in `metrics.loss = nan`.

    None if there is none.
    """
    items: Iterable[tuple[object, JsonValue]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    elif isinstance(value, float) and not math.isfinite(value):
        return f"{path} = {value}"
    for name, inner in items:
        found = not_finite(inner, f"{path}.{name}" if path else str(name))
        if found is not None:
            return found
    return None


def unsealed(data: bytes, where: str) -> JsonObject:
    """The fields in a file that `sealed` made, or in one of format 1. `where` names the file.

    Raises DamagedError for bytes that are no such file, or that have changed, and UserError for a
    file of a newer raytvb.
    """
    fields = parse_json(data, where)
    if not isinstance(fields, dict):
        raise unreadable(where, "it is not a JSON object")
    problem = format_problem(fields, where)
    if problem is not None and problem.newer:
        raise UserError(str(problem))
    if problem is not None:
        raise DamagedError(problem.reason, problem.remedy)
    seal = fields.pop(SEAL, None)
    if seal is None and fields.get("format", 1) == 1:
        return fields
    if not _is_sealed(fields, seal, data):
        raise unreadable(where, "its contents have changed since it was written")
    return fields


def _is_sealed(fields: JsonObject, seal: object, data: bytes) -> bool:
    """Whether these are exactly the bytes that `sealed` wrote for the fields."""
    try:
        if hashlib.sha256(json_bytes(fields)).hexdigest() != seal:
            return False
        return json_bytes({**fields, SEAL: seal}) == data
    except (ValueError, RecursionError):  # NaN, half characters, or nested too deeply
        return False
