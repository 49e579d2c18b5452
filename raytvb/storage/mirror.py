"""Local copies of store files that are read often."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from raytvb.errors import VectorError
from raytvb.storage.checked_file import CheckedFile, recorded
from raytvb.storage.damage import DamagedError, differs
from raytvb.storage.records import FileInfo, prefix_of, record_key
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreKeyError
from raytvb.storage.stored_basis import StoredBasis
from raytvb.storage.vectors import VectorFile, mask_key_of


class Mirror:
    """Local copies of store files, deleted when the process ends. A local store needs no copies.

    A file is compared with its record: a copy when it is made, a file of a local store while it is
    read. Every error names the file in the store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = None if store.is_local else tempfile.TemporaryDirectory(prefix="raytvb-")
        self.local = store if self._folder is None else Store(self._folder.name)
        """A store with the copies; the original store if that is local."""

    def fetch(self, key: str) -> None:
        """Make the key readable through `local`.

        Raises DamagedError if the file has a record and is missing or differs from it.
        """
        if self._folder is None or self.local.exists(key):
            return
        file = CheckedFile.find(self._store, key)
        if file.info is None:
            self._store.download(key, self._path(key))
            return
        self._fetch_recorded(file, file.info)

    def _fetch_version(self, key: str, info: FileInfo) -> None:
        """Make one version of a file readable. A copy of another version is replaced."""
        if self._folder is None:
            return
        if not self.local.exists(key) or recorded(self.local, key) != info:
            self._fetch_recorded(CheckedFile(self._store, key, info), info)

    def _fetch_recorded(self, file: CheckedFile, info: FileInfo) -> None:
        """Copy a file, under another name until it has been compared, and its record."""
        record, unchecked = record_key(prefix_of(file.key)), f"{file.key}.unchecked"
        if recorded(self.local, file.key) != info:
            data = self._store.find(record)
            if data is not None:
                self.local.write(record, data)
        try:
            self._store.download(file.key, self._path(unchecked))
            CheckedFile(self.local, unchecked, info).check()
        except StoreKeyError:
            raise differs(file.where, self._store.url, "it is missing") from None
        except DamagedError:
            raise differs(file.where, self._store.url, "its contents have changed") from None
        Path(self._path(unchecked)).rename(self._path(file.key))
        CheckedFile(self.local, file.key, info).accept()

    def _path(self, key: str) -> str:
        """The path of a copy."""
        return str(Path(self.local.path("")) / key)

    def checked(self, key: str) -> None:
        """As `fetch`, and compares a file of a local store as a whole, once in a process."""
        self.fetch(key)
        if self._folder is None:
            CheckedFile.find(self._store, key).check()

    def basis(self, prefix: str, files: Mapping[str, FileInfo] | None = None) -> StoredBasis:
        """Open a basis. All its files and its mask are fetched. Raises as `StoredBasis`.

        files: those that its record lists, for a caller that has read the record. DamagedError:
        another version of the basis has taken its place since.
        """
        remote = StoredBasis(self._store, prefix, files)
        if self._folder is None:
            return remote
        for key in (remote.index_key, *remote.files):
            info = None if files is None else files.get(key.rpartition("/")[2])
            if info is None:
                self.fetch(key)
            else:
                self._fetch_version(key, info)
        if remote.layout.mask_key is not None:
            self.fetch(remote.layout.mask_key)
        return StoredBasis(self.local, prefix, files)

    def vector(self, key: str, info: FileInfo | None = None) -> VectorFile:
        """Open a vector file. The whole file and its mask are fetched. Raises as `VectorFile`.

        info: the version that is wanted, for a caller that has read the vector's record. To read
        only headers and masks, open the file in the store itself (`VectorSet.open`).
        """
        if info is None:
            self.fetch(key)
        else:
            self._fetch_version(key, info)
        with self._naming(key):
            mask_key = mask_key_of(self.local, key)
        if mask_key is not None:
            self.fetch(mask_key)
        with self._naming(key):
            return VectorFile(self.local, key, info=info)

    @contextmanager
    def _naming(self, key: str) -> Iterator[None]:
        """Make an error of a copied vector name the file in the store, not its copy."""
        try:
            yield
        except VectorError:
            VectorFile(self._store, key)
            raise


@cache
def mirror(url: str) -> Mirror:
    """The process's mirror of a store."""
    return Mirror(Store(url))
