"""A stored file whose bytes are compared with its record while they are read.

A record has a checksum for each part of 4 MiB. The first time that a process reads from a part, the
whole part is read and compared; later reads of the part are not compared again. So a process pays
for the comparison once, whatever it reads and how often. A file without a record is read as it is:
it may be a vector file of the user's own.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property

from raytvb.storage.damage import DamagedError, differs
from raytvb.storage.records import PART, FileInfo, find, prefix_of
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError, StoreKeyError

_STREAM = 16 * 2**20
"""Number of bytes that are read at a time of a file whose record has no checksums of parts."""

_CHECKED: defaultdict[tuple[str, str, str, str], set[int]] = defaultdict(set)
"""Numbers of the parts that this process has compared, by store, key and checksum of the file, and
by when a local file was written.
"""


def recorded_files(store: Store, folder: str) -> Mapping[str, FileInfo] | None:
    """What the record of a folder says of the files right in it, by their names.

    Some things keep files in folders of their own, which have no record; then the record of the
    thing is in the folder above. None if there is no record that lists files of the folder. Raises
    DamagedError for a damaged record, and UserError for one of a newer raytvb.
    """
    record = find(store, folder)
    if record is not None:
        return record.files
    above, _, name = folder.rpartition("/")
    record = find(store, above) if above else None
    if record is None:
        return None
    files: dict[str, FileInfo] = {}
    for file, info in record.files.items():
        if file.startswith(f"{name}/"):
            files[file.removeprefix(f"{name}/")] = info
    return files or None


def recorded(store: Store, key: str) -> FileInfo | None:
    """What a record says of a file; None if no record lists it. Raises as `recorded_files`."""
    files = recorded_files(store, prefix_of(key))
    return None if files is None else files.get(key.rpartition("/")[2])


class CheckedFile:
    """One file of a store. Several threads may use one object."""

    def __init__(self, store: Store, key: str, info: FileInfo | None) -> None:
        """Touches no storage. info: what the file's record says; None: nothing is compared."""
        self.store, self.key, self.info = store, key, info

    @classmethod
    def find(cls, store: Store, key: str) -> CheckedFile:
        """The file with what its record says, if there is a record. Raises as `recorded`."""
        return cls(store, key, recorded(store, key))

    @property
    def where(self) -> str:
        """The file's path, for messages."""
        return self.store.where(self.key)

    @cached_property
    def size(self) -> int:
        """Bytes of the file, as recorded. StoreKeyError: no record and no file.

        DamagedError: a local file has another size. That of a remote file would take a request.
        """
        if self.info is None:
            return self.store.size(self.key)
        if self.store.is_local:
            self._check_size()
        return self.info.size

    def read(self) -> bytes:
        """The whole file. Raises DamagedError unless it is as its record says."""
        if self.info is None:
            return self.store.read(self.key)
        data = self.store.find(self.key)
        if data is None:
            raise self._differs("it is missing")
        if not self.info.is_of(data):
            raise self._differs(self.info.problem_with(data))
        self.accept()
        return data

    def accept(self) -> None:
        """Compare no part of the file again: the caller has just compared all of it."""
        if self.info is not None:
            self._done.update(range(max(1, len(self.info.parts))))

    def peek(self, start: int, stop: int) -> bytes:
        """Bytes start..stop-1, not compared. Raises DamagedError if the file is shorter."""
        try:
            return self.store.read_range(self.key, start, stop)
        except StoreError as error:
            raise self._explained(error) from error

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes start..stop-1. Raises DamagedError unless they are as recorded."""
        self.check(start, stop)
        return self.peek(start, stop)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Read bytes from `start` on until `buffer` is full. Raises as `read_range`."""
        self.check(start, start + len(buffer))
        try:
            self.store.read_into(self.key, start, buffer)
        except StoreError as error:
            raise self._explained(error) from error

    def check(self, start: int = 0, stop: int | None = None) -> None:
        """Compare the parts that hold bytes start..stop-1, unless this process has done so.

        Raises DamagedError if they differ from what is recorded.
        """
        if self.info is None:
            return
        stop = self.size if stop is None else stop  # the whole file: with its length
        if start < stop:
            for number in range(start // self._part, -(-stop // self._part)):
                if number not in self._done:
                    self._check_part(number)

    def compare_all(self) -> None:
        """As `check` of the whole file, whatever this process has compared before."""
        if self.info is not None:
            self._done.clear()
            self.check()

    def parts(self, low: int, high: int, readers: int) -> Iterator[tuple[int, memoryview]]:
        """Bytes low..high-1 as consecutive (position, bytes); each part is compared.

        readers: how many parts are read at a time, and in memory. Raises as `read_range`.
        """
        if low >= high:
            return
        size = self._part if self.info is not None else PART
        numbers = range(low // size, -(-high // size))
        with ThreadPoolExecutor(readers) as pool:
            for group in range(0, len(numbers), readers):
                chosen = numbers[group : group + readers]
                for number, data in zip(chosen, pool.map(self._part_bytes, chosen), strict=True):
                    start = number * size
                    first, last = max(0, low - start), max(0, min(len(data), high - start))
                    if last > first:
                        yield start + first, memoryview(data)[first:last]

    def _part_bytes(self, number: int) -> bytes:
        size = self._part if self.info is not None else PART
        data = self.peek(number * size, min((number + 1) * size, self.size))
        if self.info is not None:
            self._compare(number, hashlib.sha256(data).hexdigest())
        return data

    def _check_part(self, number: int) -> None:
        assert self.info is not None
        digest = hashlib.sha256()
        last = min((number + 1) * self._part, self.info.size)
        for start in range(number * self._part, last, _STREAM):
            digest.update(self.peek(start, min(start + _STREAM, last)))
        self._compare(number, digest.hexdigest())

    def _compare(self, number: int, digest: str) -> None:
        assert self.info is not None
        digests = self.info.parts or (self.info.sha256,)
        if number >= len(digests) or digests[number] != digest:
            raise self._differs("its contents have changed")
        self._done.add(number)

    @property
    def _part(self) -> int:
        """Bytes of a part. A file without checksums of parts is one part, of any size."""
        assert self.info is not None
        return PART if self.info.parts else max(self.info.size, 1)

    @cached_property
    def _done(self) -> set[int]:
        """Numbers of the parts that have been compared. A file that has been written since is
        compared again when it is opened again.
        """
        assert self.info is not None
        path, written = self.store.local_path(self.key), ""
        if path is not None:
            with suppress(OSError):
                status = os.stat(path)
                written = f"{status.st_ino} {status.st_mtime_ns} {status.st_size}"
        return _CHECKED[self.store.url, self.key, self.info.sha256, written]

    def _explained(self, error: StoreError) -> StoreError:
        """The error of a read. A recorded file that is missing or too short is damaged."""
        try:
            self._check_size()
        except DamagedError as damaged:
            return damaged
        return error

    def _check_size(self) -> None:
        """Raise DamagedError if a recorded file is missing or has another size."""
        if self.info is None:
            return
        try:
            size = self.store.size(self.key)
        except StoreKeyError:
            raise self._differs("it is missing") from None
        if size != self.info.size:
            raise self._differs(f"it has {size} bytes instead of {self.info.size}")

    def _differs(self, problem: str) -> DamagedError:
        return differs(self.where, self.store.url, problem)
