"""Local copies of store files for reading them often."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from raytvb.storage.basis_layout import INDEX
from raytvb.storage.store import Store
from raytvb.storage.stored_basis import StoredBasis
from raytvb.storage.vectors import VectorFile


class Mirror:
    """Local copies of store files for reading them often; a local store needs no copies. Removed
    with the process.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = (
            None if store.local_path("x") else tempfile.TemporaryDirectory(prefix="raytvb-")
        )
        self.local = store if self._folder is None else Store(self._folder.name)

    def fetch(self, key: str) -> None:
        """Make the key readable through `local`."""
        if self._folder is not None and not self.local.exists(key):
            self._store.download(key, str(Path(self._folder.name) / key))

    def basis(self, prefix: str) -> StoredBasis:
        """Open a basis, all of its files and its mask fetched along with it."""
        remote = StoredBasis(self._store, prefix)
        if self._folder is None:
            return remote
        for key in (
            f"{prefix}/{INDEX}",
            *remote.files,
            *([remote.layout.mask_key] if remote.layout.mask_key else []),
        ):
            self.fetch(key)
        return StoredBasis(self.local, prefix)

    def vector(self, key: str) -> VectorFile:
        """Open a vector file, its mask fetched along with it."""
        remote = VectorFile(self._store, key)
        if self._folder is None:
            return remote
        self.fetch(key)
        if remote.mask is not None:
            self.fetch(remote.mask_key)
        return VectorFile(self.local, key)


@cache
def mirror(url: str) -> Mirror:
    """The process's mirror of a store."""
    return Mirror(Store(url))
