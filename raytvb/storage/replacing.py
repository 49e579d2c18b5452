"""Things that are written again: at every moment, the old one or the new one is there as a whole.

A thing exists as its record says, so the record is the one switch. The new files get names that no
file of the old thing has (`new_tag`). Then `commit_over` writes the record, which lists the new
files, and deletes the old ones. A writer that is killed before the record leaves the old thing as
it was; one that is killed after it leaves the new thing, and old files that no record lists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from pydantic import JsonValue

from raytvb.storage import records
from raytvb.storage.contract import Contract
from raytvb.storage.damage import DamagedError
from raytvb.storage.records import FileInfo, Record, file_key, parse_record, record_key
from raytvb.storage.store import Store


def new_tag(store: Store, prefix: str, contents: bytes) -> str:
    """What the names of a thing's new files contain, so that they replace no file of the old one.

    '' if the thing does not exist yet, or if its record is damaged. Otherwise 8 hex digits, which
    depend on the old record and on `contents` (any bytes that stand for the new thing). So a writer
    that was killed and starts again writes the same names, and leaves no other files behind. Raises
    UserError for a record of a newer raytvb.
    """
    key = record_key(prefix)
    data = store.find(key)
    if data is None:
        return ""
    try:
        names = parse_record(data, store.where(key)).files
    except DamagedError:
        return ""
    digest = hashlib.sha256(data + contents)
    while any(digest.hexdigest()[:8] in name for name in names):
        digest.update(b"again")
    return digest.hexdigest()[:8]


def tagged(name: str, tag: str) -> str:
    """The name of a file with a tag: `basis.json` with the tag `ab` is `basis-ab.json`."""
    stem, dot, ending = name.partition(".")
    return f"{stem}-{tag}{dot}{ending}" if tag else name


def commit_over(
    store: Store,
    prefix: str,
    *,
    identity: Mapping[str, JsonValue],
    files: Mapping[str, bytes] | None = None,
    written: Mapping[str, FileInfo] | None = None,
    parents: Mapping[str, str] | None = None,
    metrics: Contract | None = None,
) -> Record:
    """As `records.commit`, and then deletes the files of the old thing that the new one lacks.

    The names of the new files must have the tag of `new_tag`. The old thing may have any identity.
    """
    before = _names(store, prefix)
    record = records.commit(
        store,
        prefix,
        identity=identity,
        files=files,
        written=written,
        parents=parents,
        metrics=metrics,
    )
    for name in before - record.files.keys():
        store.delete(file_key(prefix, name))
    return record


def commit_version(
    store: Store,
    prefix: str,
    name: str,
    data: bytes,
    *,
    before: Record | None,
    identity: Mapping[str, JsonValue],
    parents: Mapping[str, str],
    metrics: Contract,
) -> Record:
    """Commit a thing of one file, in the place of the one before, which stays until then.

    name: of the file; it gets a tag if there is a thing before. before: the record of that thing.
    """
    if before is None:
        files, write = {name: data}, records.commit
    else:
        files, write = {tagged(name, new_tag(store, prefix, data)): data}, commit_over
    return write(store, prefix, identity=identity, files=files, parents=parents, metrics=metrics)


def _names(store: Store, prefix: str) -> set[str]:
    """The files of a thing; none if it has no record, or one that cannot be read."""
    try:
        record = records.find(store, prefix)
    except DamagedError:
        return set()
    return set() if record is None else set(record.files)


def delete_thing(store: Store, folder: str) -> None:
    """Delete a folder with everything in it, records first.

    A folder is deleted in no particular order. If it were stopped before the record, the thing
    would seem to exist without its files.
    """
    for key in records.record_keys(store, folder):
        store.delete(key)
    store.delete(folder)
