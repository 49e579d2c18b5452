"""Local copies of store files that are read often."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from raytvb.errors import VectorError
from raytvb.storage.basis_layout import INDEX
from raytvb.storage.store import Store
from raytvb.storage.stored_basis import StoredBasis
from raytvb.storage.vectors import VectorFile, mask_key_of


class Mirror:
    """Local copies of store files, deleted when the process ends. A local store needs no copies."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = None if store.is_local else tempfile.TemporaryDirectory(prefix="raytvb-")
        self.local = store if self._folder is None else Store(self._folder.name)
        """A store with the copies; the original store if that is local."""

    def fetch(self, key: str) -> None:
        """Make the key readable through `local`."""
        if self._folder is not None and not self.local.exists(key):
            self._store.download(key, str(Path(self._folder.name) / key))

    def basis(self, prefix: str) -> StoredBasis:
        """Open a basis. All its files and its mask are fetched. Raises as `StoredBasis`."""
        remote = StoredBasis(self._store, prefix)
        if self._folder is None:
            return remote
        for key in (f"{prefix}/{INDEX}", *remote.files):
            self.fetch(key)
        if remote.layout.mask_key is not None:
            self.fetch(remote.layout.mask_key)
        return StoredBasis(self.local, prefix)

    def vector(self, key: str) -> VectorFile:
        """Open a vector file. The whole file and its mask are fetched. Raises as `VectorFile`.

        To read only headers and masks, open the file in the store itself (`VectorSet.open`).
        """
        try:
            self.fetch(key)
            mask_key = mask_key_of(self.local, key)
            if mask_key is not None:
                self.fetch(mask_key)
            return VectorFile(self.local, key)
        except VectorError:
            VectorFile(self._store, key)  # the error names the file in the store, not its copy
            raise


@cache
def mirror(url: str) -> Mirror:
    """The process's mirror of a store."""
    return Mirror(Store(url))
