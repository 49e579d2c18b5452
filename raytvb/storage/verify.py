"""Checks of stored files against their recorded checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from raytvb.errors import UserError
from raytvb.storage import records
from raytvb.storage.records import FileInfo, Record
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError, StoreKeyError

_READ_BYTES = 64 * 2**20
"""Number of bytes of a file that are read at a time."""


def check_files(store: Store, prefix: str, names: Sequence[str] | None = None) -> None:
    """Compare the files of the thing under `prefix` with its record.

    names: the files to compare; None: all. Raises UserError that names the first file that differs
    from its record.
    """
    record = records.find(store, prefix)
    if record is None:
        return
    for name, info in record.files.items():
        if names is None or name in names:
            problem = _problem(store, f"{prefix}/{name}", info)
            if problem is not None:
                raise UserError(f"{store.url}: {problem}")


def _problem(store: Store, key: str, info: FileInfo) -> str | None:
    """What is wrong with a stored file and what to do; None if the file is as recorded."""
    folder = key.rpartition("/")[0]
    way_out = f"delete the folder {folder} and run again to make it anew"
    try:
        size = store.size(key)
        if size != info.size:
            return f"{key}: {size} bytes instead of {info.size}; {way_out}"
        if _checksum(store, key, size) != info.sha256:
            return f"{key}: its contents have changed; {way_out}"
    except StoreKeyError:
        return f"{key}: missing; {way_out}"
    return None


def _checksum(store: Store, key: str, size: int) -> str:
    """sha256 of a file of `size` bytes. The file is never in memory as a whole."""
    digest = hashlib.sha256()
    for start in range(0, size, _READ_BYTES):
        digest.update(store.read_range(key, start, min(start + _READ_BYTES, size)))
    return digest.hexdigest()


def verify(store: Store) -> tuple[int, list[str]]:
    """Check every recorded file of a store against its checksum. Returns as `verify_records`."""
    return verify_records(store, records.record_keys(store))


def verify_records(store: Store, keys: Sequence[str]) -> tuple[int, list[str]]:
    """Check the files of some records, given by the keys of the records.

    Returns the number of files checked, and the problems, each of which names its file. A record
    that cannot be read is a problem too. All records of a newer raytvb count as one problem.
    """
    checked = 0
    problems: list[str] = []
    newer: list[str] = []
    for key in keys:
        try:
            record = records.read_record(store, key)
        except StoreKeyError:  # deleted since it was listed
            continue
        except UserError as error:
            newer.append(str(error))
        except StoreError as error:
            problems.append(str(error))
        else:
            checked += len(record.files)
            problems += _problems(store, key.removesuffix(f"/{records.RECORD}"), record)
    if newer:
        others = f" (and {len(newer) - 1} other records)" if len(newer) > 1 else ""
        problems.insert(0, newer[0] + others)
    return checked, problems


def _problems(store: Store, prefix: str, record: Record) -> list[str]:
    """What is wrong with the files of one thing."""
    problems = []
    for name, info in record.files.items():
        problem = _problem(store, f"{prefix}/{name}", info)
        if problem is not None:
            problems.append(problem)
    return problems
