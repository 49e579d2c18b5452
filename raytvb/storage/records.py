"""Records: a thing in the store exists when its `record.json` does. The record is written last.

A record says what the thing depends on (its identity), what it was made of (its parents), what was
measured while it was made (its metrics), and the checksum of each of its files. `commit` writes a
record, `find` reads one, and `find_all` reads those of a whole store.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

from pydantic import Field, JsonValue, model_serializer

from raytvb.errors import UserError, VectorError
from raytvb.storage.addresses import is_key
from raytvb.storage.contract import Contract, JsonObject
from raytvb.storage.damage import differs, unreadable
from raytvb.storage.format_version import FORMAT
from raytvb.storage.sealed_json import not_finite, sealed, unsealed
from raytvb.storage.shapes import Size
from raytvb.storage.store import Store

Metrics = TypeVar("Metrics", bound=Contract)

RECORD = "record.json"

PART = 4 * 2**20
"""Number of bytes in a part of a file. Each part has its own checksum."""


class FileInfo(Contract):
    """Checksum and size of one stored file."""

    sha256: str
    size: Size
    """Bytes."""
    parts: tuple[str, ...] = ()
    """Checksums of the consecutive parts of 4 MiB, so that a range can be checked without the rest.

    Empty if the file is not longer than one part.
    """

    @classmethod
    def of(cls, data: bytes) -> FileInfo:
        """Checksum and size of a file with these bytes."""
        view = memoryview(data)
        parts: list[str] = []
        if len(data) > PART:
            for start in range(0, len(data), PART):
                parts.append(hashlib.sha256(view[start : start + PART]).hexdigest())
        return cls(sha256=hashlib.sha256(data).hexdigest(), size=len(data), parts=tuple(parts))

    @model_serializer
    def _fields(self) -> JsonObject:
        """The fields for JSON, without `parts` if there are none."""
        fields: JsonObject = {"sha256": self.sha256, "size": self.size}
        return {**fields, "parts": list(self.parts)} if self.parts else fields

    def is_of(self, data: bytes) -> bool:
        """Whether these are the bytes of the file."""
        return len(data) == self.size and hashlib.sha256(data).hexdigest() == self.sha256

    def problem_with(self, data: bytes) -> str:
        """What is wrong with other bytes than those of the file."""
        if len(data) != self.size:
            return f"it has {len(data)} bytes instead of {self.size}"
        return "its contents have changed"


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    installed = {"python": platform.python_version()}
    for name in ("raytvb", "torch", "open_clip_torch", "ray", "safetensors", "numpy"):
        with suppress(PackageNotFoundError):  # raytvb itself, where a job was given its source only
            installed[name] = version(name)
    return installed


def differences(stored: object, requested: object, path: str = "") -> list[str]:
    """Fields in which two identities differ, one line each: `field: stored x, asked for y`.

    Lists whose items have a `name` (tasks) are compared item by item, and then in their order.
    """
    if isinstance(stored, dict) and isinstance(requested, dict):
        lines = []
        for key in sorted(stored.keys() | requested.keys()):
            inner = f"{path}.{key}" if path else key
            lines += differences(stored.get(key), requested.get(key), inner)
        return lines
    if stored == requested:
        return []
    ours, theirs = _by_name(stored), _by_name(requested)
    if ours and theirs:
        return _differences_by_name(ours, theirs, path)
    return [f"{path}: stored {stored!r}, asked for {requested!r}"]


def _by_name(value: object) -> dict[str, object]:
    """A list of items with names as a dictionary; empty for anything else."""
    items: dict[str, object] = {}
    for item in value if isinstance(value, list) else ():
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return {}
        items[item["name"]] = item
    return items


def _differences_by_name(
    stored: dict[str, object], requested: dict[str, object], path: str
) -> list[str]:
    """As `differences`, for two different lists of items with names."""
    lines = []
    for ours, theirs, where in (
        (stored, requested, "stored only"),
        (requested, stored, "asked for only"),
    ):
        only = [name for name in ours if name not in theirs]
        if only:
            lines.append(f"{path}: {', '.join(only)} {where}")
    for name in stored:
        if name in requested:
            lines += differences(stored[name], requested[name], f"{path}[{name}]")
    if lines:
        return lines
    return [f"{path}: stored in the order {', '.join(stored)}, asked for {', '.join(requested)}"]


class Record(Contract):
    """What `record.json` says of a stored thing."""

    identity: JsonObject
    """All that the thing depends on. The thing is made again only if this changes."""
    parents: dict[str, str] = Field(default_factory=dict)
    """Checksums of the things that it was made of, by their names."""
    metrics: JsonObject = Field(default_factory=dict)
    """What was measured while it was made; `metrics_as` gives it a type."""
    files: dict[str, FileInfo] = Field(default_factory=dict)
    """Its files by their names below the thing's folder."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of the packages that made it."""
    format: int = 1
    """Version of the store's format. Records without this field have format 1."""

    def metrics_as(self, contract: type[Metrics], where: str) -> Metrics:
        """The metrics as a contract; `where` names the thing. Raises as `from_json`."""
        return contract.from_json(self.metrics, f"{where}/{RECORD}")

    def parent(self, name: str, where: str) -> str:
        """The checksum of a parent; `where` names the thing. Raises DamagedError if it has none."""
        if name not in self.parents:
            raise unreadable(f"{where}/{RECORD}", f"parents.{name}: Field required")
        return self.parents[name]

    def file(self, name: str, where: str) -> FileInfo:
        """What the record says of a file; `where` names the thing.

        Raises DamagedError if it does not list the file.
        """
        if name not in self.files:
            raise unreadable(f"{where}/{RECORD}", f"files.{name}: Field required")
        return self.files[name]

    def is_of(self, identity: Mapping[str, JsonValue]) -> bool:
        """Whether the thing has this identity."""
        return not differences(self.identity, dict(identity))

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(info.size for info in self.files.values())


def parse_record(data: bytes, where: str) -> Record:
    """The record in the bytes of a file; `where` names the file.

    Raises DamagedError for bytes that are not a whole record, and UserError for a record of a newer
    raytvb.
    """
    record = Record.from_json(unsealed(data, where), where)
    for name in record.files:
        if not is_key(name):
            raise unreadable(where, f"files: {name!r} is not a file of its folder")
    return record


def record_key(prefix: str) -> str:
    """Key of the record of the thing under `prefix`; '' stands for the store itself."""
    return f"{prefix}/{RECORD}" if prefix else RECORD


def file_key(prefix: str, name: str) -> str:
    """Key of a file of the thing under `prefix`; '' stands for the store itself."""
    return f"{prefix}/{name}" if prefix else name


def read_record(store: Store, key: str) -> Record:
    """The record in one file of a store.

    Raises StoreKeyError if there is no such file, else as `parse_record`.
    """
    return parse_record(store.read(key), store.where(key))


def record_keys(store: Store, prefix: str = "") -> list[str]:
    """Keys of all records in the folder `prefix` and below, sorted."""
    return [key for key in store.keys(prefix) if key.rpartition("/")[2] == RECORD]


def prefix_of(key: str) -> str:
    """The thing whose record has this key; '' for the record of the store itself."""
    return key.rpartition("/")[0]


def where(store: Store, prefix: str) -> str:
    """Names the record of the thing `prefix` in messages."""
    return store.where(record_key(prefix))


def find_all(store: Store, prefix: str = "") -> dict[str, Record]:
    """The records in the folder `prefix` and below, by the folder of each thing.

    The files are listed once, then several are read at a time. Raises as `read_record`.
    """
    keys = record_keys(store, prefix)
    records = {}
    for key, data in zip(keys, store.read_many(keys), strict=True):
        records[prefix_of(key)] = parse_record(data, store.where(key))
    return records


def find(
    store: Store, prefix: str, identity: Mapping[str, JsonValue] | None = None
) -> Record | None:
    """The record under `prefix`, or None if the thing does not exist (yet). One request.

    Raises UserError if the thing exists with another identity (the message shows the fields that
    differ), and as `parse_record`.
    """
    key = record_key(prefix)
    data = store.find(key)
    if data is None:
        return None
    record = parse_record(data, store.where(key))
    if identity is not None:
        check_identity(store, prefix, record, identity)
    return record


def check_identity(
    store: Store, prefix: str, record: Record, identity: Mapping[str, JsonValue]
) -> None:
    """Raise UserError that shows the fields that differ, unless a thing has this identity."""
    differing = differences(record.identity, dict(identity))
    if differing:
        raise UserError(
            f"{store.where(prefix)} belongs to another experiment:\n  "
            + "\n  ".join(differing)
            + "\nUse another store, or delete that folder to make it again."
        )


def is_first_format(store: Store) -> bool:
    """Whether the store's pretrained model was stored by a raytvb that wrote format 1.

    In such a store, files without a record are no sign of damage.
    """
    base = find(store, "base")
    return base is not None and base.format == 1


def read_file(store: Store, prefix: str, name: str, record: Record) -> bytes:
    """A whole file of a thing. Raises DamagedError unless it is there and as its record says."""
    where = store.where(file_key(prefix, name))
    info = record.file(name, store.where(prefix))
    data = store.find(file_key(prefix, name))
    if data is None:
        raise differs(where, store.url, "it is missing")
    if not info.is_of(data):
        raise differs(where, store.url, info.problem_with(data))
    return data


def commit(
    store: Store,
    prefix: str,
    *,
    identity: Mapping[str, JsonValue],
    files: Mapping[str, bytes] | None = None,
    written: Mapping[str, FileInfo] | None = None,
    parents: Mapping[str, str] | None = None,
    metrics: Contract | None = None,
) -> Record:
    """Write `files` (name to bytes), then the record that makes the thing exist.

    `written` describes files of the thing that are in the store already. Raises VectorError that
    names a number among the metrics or in the identity that is NaN or infinite, and then writes
    nothing.
    """
    measured = {} if metrics is None else metrics.to_json()
    bad = not_finite({"identity": dict(identity), "metrics": measured})
    if bad is not None:
        raise VectorError(f"{where(store, prefix)} would have {bad}", "nothing was written")
    infos = dict(written or {})
    for name, data in (files or {}).items():
        store.write(file_key(prefix, name), data)
        infos[name] = FileInfo.of(data)
    record = Record(
        identity=dict(identity),
        parents=dict(parents or {}),
        metrics=measured,
        files=infos,
        versions=versions(),
        format=FORMAT,
    )
    store.write(record_key(prefix), sealed(record.to_json()))
    return record
