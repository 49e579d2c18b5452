"""Records: a thing in the store exists when its `record.json` does. Data first, record last."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from raytvb.errors import UserError
from raytvb.storage.store import Store

RECORD = "record.json"


PART = 4 * 2**20  # bytes


@dataclass(frozen=True)
class FileInfo:
    """Checksum and size in bytes of one stored file."""

    sha256: str
    size: int
    parts: tuple[str, ...] = ()
    """Checksums of its consecutive parts of 4 MiB, where it is larger: a range can be checked
    without the rest.
    """

    @classmethod
    def of(cls, data: bytes) -> FileInfo:
        """Of bytes in memory."""
        view = memoryview(data)
        parts = [hashlib.sha256(view[i : i + PART]).hexdigest() for i in range(0, len(data), PART)]
        return cls(
            hashlib.sha256(data).hexdigest(), len(data), tuple(parts) if len(parts) > 1 else ()
        )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> FileInfo:
        """As a record has it."""
        return cls(fields["sha256"], fields["size"], tuple(fields.get("parts", ())))

    def to_json(self) -> dict[str, Any]:
        """For a record."""
        return {"sha256": self.sha256, "size": self.size} | (
            {"parts": list(self.parts)} if self.parts else {}
        )

    def is_of(self, data: bytes) -> bool:
        """The bytes are those of the file."""
        return len(data) == self.size and hashlib.sha256(data).hexdigest() == self.sha256


@cache
def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("raytvb", "torch", "open_clip_torch", "ray", "safetensors", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        with suppress(PackageNotFoundError):  # raytvb itself, where a job was given its source only
            found[name] = version(name)
    return found


def differences(stored: Any, asked: Any, path: str = "") -> list[str]:
    """Fields in which two identities differ, one line each: `field: stored x, asked for y`.

    In lists of things with a `name` (tasks) the things are compared by it, and then their order.
    """
    if isinstance(stored, dict) and isinstance(asked, dict):
        lines = []
        for key in sorted(stored.keys() | asked.keys()):
            lines += differences(stored.get(key), asked.get(key), f"{path}.{key}" if path else key)
        return lines
    ours, theirs = _by_name(stored), _by_name(asked)
    if ours and theirs and stored != asked:
        only = [
            f"{path}: {', '.join(n for n in left if n not in right)} {where}"
            for left, right, where in (
                (ours, theirs, "stored only"),
                (theirs, ours, "asked for only"),
            )
            if left.keys() - right.keys()
        ]
        shared = [
            d for n in ours if n in theirs for d in differences(ours[n], theirs[n], f"{path}[{n}]")
        ]
        return only + shared or [
            f"{path}: stored in the order {', '.join(ours)}, asked for {', '.join(theirs)}"
        ]
    return [] if stored == asked else [f"{path}: stored {stored!r}, asked for {asked!r}"]


def _by_name(value: Any) -> dict[str, Any]:
    """A list of things with names as a dictionary; empty for anything else."""
    named = isinstance(value, list) and all(isinstance(v, dict) and "name" in v for v in value)
    return {v["name"]: v for v in value} if named else {}


def find(
    store: Store, prefix: str, identity: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """The record under `prefix`, or None where the thing does not exist (yet).

    Raises UserError where it exists with another identity; the message shows the fields that
    differ.
    """
    key = f"{prefix}/{RECORD}"
    if not store.exists(key):
        return None
    record = store.read_json(key)
    if identity is not None:
        differing = differences(record["identity"], dict(identity))
        if differing:
            raise UserError(
                f"{store.where(prefix)} belongs to another experiment:\n  "
                + "\n  ".join(differing)
                + "\nUse another store, or delete that folder to make it again."
            )
    return record


def commit(
    store: Store,
    prefix: str,
    *,
    identity: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    written: Mapping[str, FileInfo] | None = None,
    parents: Mapping[str, str] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `files` (name to bytes), then the record that makes them exist; `written` names files
    already there.
    """
    infos = dict(written or {})
    for name, data in (files or {}).items():
        store.write(f"{prefix}/{name}", data)
        infos[name] = FileInfo.of(data)
    record = {
        "identity": dict(identity),
        "parents": dict(parents or {}),
        "metrics": dict(metrics or {}),
        "files": {n: i.to_json() for n, i in sorted(infos.items())},
        "versions": versions(),
    }
    store.write_json(f"{prefix}/{RECORD}", record)
    return record
