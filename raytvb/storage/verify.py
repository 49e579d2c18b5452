"""Stored files against their recorded checksums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raytvb.errors import UserError
from raytvb.storage import records
from raytvb.storage.records import FileInfo
from raytvb.storage.store import Store


def check_files(store: Store, prefix: str, names: Sequence[str] | None = None) -> None:
    """Raise UserError for a file of the thing under `prefix` (or those of the names) that is not as
    recorded.
    """
    record = records.find(store, prefix)
    for name, info in ({} if record is None else record["files"]).items():
        if names is None or name in names:
            problem = _problem(store, f"{prefix}/{name}", info)
            if problem:
                raise UserError(f"{store.url}: {problem}")


def _problem(store: Store, key: str, info: Mapping[str, Any]) -> str | None:
    """What is wrong with a stored file, and the way out; None where it is as recorded."""
    try:
        data = store.read(key)
    except FileNotFoundError:
        found = "missing"
    else:
        if FileInfo.from_json(info).is_of(data):
            return None
        same = len(data) == info["size"]
        found = (
            "its contents have changed" if same else f"{len(data)} bytes instead of {info['size']}"
        )
    return (
        f"{key}: {found}; delete the folder {key.rpartition('/')[0]} and run again to make it anew"
    )


def verify(store: Store) -> tuple[int, list[str]]:
    """Check every recorded file against its checksum: (files checked, problems, each naming its
    file).
    """
    checked, problems = 0, []
    for key in store.keys():
        if not key.endswith(f"/{records.RECORD}"):
            continue
        prefix = key.removesuffix(f"/{records.RECORD}")
        for name, info in store.read_json(key)["files"].items():
            path = f"{prefix}/{name}"
            checked += 1
            problem = _problem(store, path, info)
            if problem:
                problems.append(problem)
    return checked, problems
