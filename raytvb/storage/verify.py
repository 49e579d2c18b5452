"""Looks for files of a store that are missing, shortened, altered, or of no record."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from raytvb.errors import UserError, VectorError
from raytvb.storage import records
from raytvb.storage.addresses import is_key
from raytvb.storage.checked_file import CheckedFile
from raytvb.storage.damage import DamagedError
from raytvb.storage.gram_rows import OWNER, ROWS, check_rows
from raytvb.storage.records import RECORD, FileInfo, Record, file_key, prefix_of
from raytvb.storage.sealed_json import unsealed
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreKeyError

MISSING, TRUNCATED, ALTERED, ORPHANED = "missing", "truncated", "altered", "orphaned"


@dataclass(frozen=True, order=True)
class Problem:
    """What is wrong with one file of a store."""

    key: str
    kind: str
    """missing, truncated, altered or orphaned."""
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.kind}: {self.reason}"


@dataclass
class Findings:
    """What was found in a store, or in a part of one."""

    checked: int = 0
    """Number of files that were compared with a checksum."""
    problems: list[Problem] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)
    """Files of a store of format 1 that have no checksum."""
    newer: list[str] = field(default_factory=list)
    """Messages on records of a newer raytvb, which this one cannot check."""

    def add(self, other: Findings) -> None:
        """Add what was found in another part of the store."""
        self.checked += other.checked
        self.problems += other.problems
        self.unrecorded += other.unrecorded
        self.newer += other.newer

    def messages(self) -> list[str]:
        """One line for each problem. Records of a newer raytvb count as one problem."""
        lines = [str(problem) for problem in sorted(self.problems)]
        if self.newer:
            others = f" (and {len(self.newer) - 1} other records)" if len(self.newer) > 1 else ""
            lines.insert(0, self.newer[0] + others)
        return lines


def check_files(store: Store, prefix: str, names: Sequence[str] | None = None) -> None:
    """Compare files of the thing under `prefix` with its record, once in a process.

    names: the files to compare; None: all. Raises DamagedError that names the first file that
    differs from its record.
    """
    record = records.find(store, prefix)
    if record is None:
        return
    for name, info in record.files.items():
        if names is None or name in names:
            CheckedFile(store, file_key(prefix, name), info).check()


def record_keys_of(keys: Iterable[str]) -> list[str]:
    """Those of the keys that are keys of records."""
    return [key for key in keys if key.rpartition("/")[2] == RECORD]


def verify_records(
    store: Store, keys: Sequence[str], sizes: Mapping[str, int] | None = None
) -> tuple[Findings, dict[str, Record]]:
    """Check some records, given by their keys, and the files that they list.

    sizes: of all files of the store, by key; None: they are asked for one by one. Returns what was
    found, and the records that can be read, by the folders of the things.
    """
    findings, found = Findings(), dict[str, Record]()
    for key in filter(is_key, keys):
        try:
            record = records.read_record(store, key)
        except StoreKeyError:  # deleted since it was listed
            continue
        except UserError as error:
            findings.newer.append(str(error))
            continue
        except DamagedError as error:
            findings.problems.append(Problem(key, ALTERED, error.reason))
            continue
        findings.checked += 1
        found[prefix_of(key)] = record
        for name, info in record.files.items():
            findings.checked += 1
            problem = _problem(store, file_key(prefix_of(key), name), info, sizes)
            if problem is not None:
                findings.problems.append(problem)
    return findings, found


def _problem(
    store: Store, key: str, info: FileInfo, sizes: Mapping[str, int] | None
) -> Problem | None:
    """What is wrong with a recorded file; None if it is as recorded."""
    try:
        size = store.size(key) if sizes is None else sizes.get(key)
    except StoreKeyError:
        size = None
    if size is None:
        return Problem(key, MISSING, f"its record lists it, in {prefix_of(key) or 'the store'}")
    if size != info.size:
        kind = TRUNCATED if size < info.size else ALTERED
        return Problem(key, kind, f"it has {size} bytes instead of {info.size}")
    try:
        CheckedFile(store, key, info).compare_all()
    except DamagedError:
        return Problem(key, ALTERED, "its contents have changed")
    return None


def unclaimed(store: Store, keys: Iterable[str]) -> Findings:
    """Check the files that no record lists: those with a checksum in themselves, and orphans.

    keys: of all files of the store. Raises nothing for a file that is deleted meanwhile.
    """
    findings, every = Findings(), sorted(keys)
    claimed, damaged = _claimed(store, every)
    first_format = _may_be_first_format(store)
    for key in every:
        if key in claimed:
            continue
        if is_key(key) and (key == OWNER or prefix_of(key) == ROWS):
            findings.checked += 1
            _check_own(store, key, findings)
        elif first_format and _is_of_first_format(key):
            findings.unrecorded.append(key)
        elif prefix_of(key) not in damaged:
            findings.problems.append(Problem(key, ORPHANED, _why_orphaned(key, every)))
    return findings


def _claimed(store: Store, keys: Sequence[str]) -> tuple[set[str], set[str]]:
    """The records and all files that they list; and the folders of records that cannot be read."""
    claimed, unreadable = set[str](), set[str]()
    names = record_keys_of(filter(is_key, keys))
    for key, data in zip(names, store.read_many(names), strict=True):
        claimed.add(key)
        try:
            record = records.parse_record(data, store.where(key))
        except (DamagedError, UserError):
            unreadable.add(prefix_of(key))
            continue
        claimed.update(file_key(prefix_of(key), name) for name in record.files)
    return claimed, unreadable


def _why_orphaned(key: str, keys: Sequence[str]) -> str:
    folder = prefix_of(key)
    if not is_key(key):
        return "raytvb does not write such names: delete it yourself"
    if file_key(folder, RECORD) in keys:
        return "the record of its folder does not list it"
    return "its folder has no record: the record was deleted, or is not written yet"


def _may_be_first_format(store: Store) -> bool:
    """As `records.is_first_format`. True if the record that tells cannot be read.

    Then no file is taken for an orphan only because it has no record.
    """
    try:
        return records.is_first_format(store)
    except (DamagedError, UserError):
        return True


def _check_own(store: Store, key: str, findings: Findings) -> None:
    """Add to the findings what is wrong with a file that holds its own checksum."""
    data = store.find(key)
    if data is None:
        return
    try:
        if key == OWNER:
            unsealed(data, store.where(key))
        else:
            check_rows(data, store.where(key))
    except DamagedError as error:
        findings.problems.append(Problem(key, ALTERED, error.reason))
    except (UserError, VectorError) as error:
        findings.newer.append(str(error))


def _is_of_first_format(key: str) -> bool:
    """Whether a store of format 1 has such a file without a checksum."""
    folder, _, name = key.partition("/")
    if folder == "evals":
        return key.endswith(".parquet")
    if folder == "vectors":
        return key.endswith("/head.safetensors")
    if folder == "search":
        return name.startswith("tune-")
    return key == "experiment.yaml" or key.startswith(("base/heads/", "report/"))


def repair(store: Store, problems: Iterable[Problem]) -> list[str]:
    """Remove what the next run must make again. Returns the keys that were removed.

    A repair that is stopped leaves nothing that looks whole.
    """
    keys = removable(store, problems)
    for key in keys:
        store.delete(key)
    return keys


def removable(store: Store, problems: Iterable[Problem]) -> list[str]:
    """The keys that a repair removes, in this order.

    Of a thing with a missing or damaged file, these are the record and then its files. Nothing is
    to be removed of a thing that is missing as a whole.
    """
    removed: dict[str, None] = {}
    things: dict[str, None] = {}
    keys = dict.fromkeys(store.keys())
    for problem in problems:
        prefix = prefix_of(problem.key)
        # The store's own record and experiment.yaml say the same; the whole one of them is kept.
        alone = problem.kind == ORPHANED or prefix in ("", ROWS) or problem.key == OWNER
        if alone:
            removed[problem.key] = None
        else:
            things[_thing_of(problem.key, keys)] = None
    for prefix in things:
        removed |= dict.fromkeys(_keys_of_thing(store, prefix, keys))
    return [key for key in removed if key in keys and is_key(key)]


def _thing_of(key: str, keys: Container[str]) -> str:
    """The thing that a damaged file belongs to: a record also lists files in folders below it."""
    prefix = prefix_of(key)
    folder = prefix
    while folder and key != file_key(prefix, RECORD):
        if file_key(folder, RECORD) in keys:
            return folder
        folder = prefix_of(folder)
    return prefix


def _keys_of_thing(store: Store, prefix: str, keys: Collection[str]) -> list[str]:
    """The record of a thing, then the files that it lists and all others right in its folder."""
    record_key = file_key(prefix, RECORD)
    listed = set[str]()
    if record_key in keys:
        with suppress(StoreKeyError, DamagedError, UserError):
            listed = set(records.read_record(store, record_key).files)
    names = {file_key(prefix, name) for name in listed}
    return [record_key, *(key for key in keys if key in names or prefix_of(key) == prefix)]
