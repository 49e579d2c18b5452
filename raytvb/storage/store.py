"""Where experiments live: one URL (a folder, s3://bucket/prefix, any fsspec scheme) that holds
files under string keys.

The only module that imports fsspec. What it adds: a key is either there in full or not there,
listings are never stale, a store pickles as its URL, and an error says which key of which store it
is about and the way out.

S3 takes endpoint and credentials from the usual AWS variables. A writer that was killed leaves no
key but may leave
bytes: a hidden temporary file in a folder, an unfinished upload in a bucket (a lifecycle rule
removes those).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import repeat
from typing import Any, NoReturn

import fsspec.asyn

from raytvb.storage.filesystems import filesystem_of
from raytvb.storage.local_files import (
    TEMPORARY,
    delete_local,
    files_below,
    local_writer,
    published_file,
)
from raytvb.storage.store_errors import WAYS_OUT, StoreError, StoreKeyError, library_code

_DELETERS = 8


_READERS = 16


class Store:
    """Files under relative keys ('vectors/a/record.json') below one URL; safe in threads, workers
    and pickles.

    Every method that reaches the storage raises StoreError where that fails, StoreKeyError where a
    key to read is missing, and ValueError for a key that is empty, absolute, not normalised or
    reserved.
    """

    def __init__(self, url: str) -> None:
        """Touches no storage. A relative path is made absolute, as workers have other working
        directories.

        Raises StoreError for an unknown scheme and for an S3 URL without a bucket.
        """
        self.url, self._scheme = _parse(url)
        self._is_local = self._scheme == "file"

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @property
    def fs(self) -> Any:
        """The fsspec filesystem, made at first use. Raises StoreError where the scheme's package is
        not installed.
        """
        return filesystem_of(self.url, self._scheme)

    def path(self, key: str) -> str:
        """The key's path as `fs` wants it; '' gives the root of the store."""
        root = self.url if self._is_local else str(self.fs._strip_protocol(self.url))
        return f"{root.rstrip('/')}/{_checked(key)}" if key else root

    def where(self, key: str) -> str:
        """The key's full URL (or local path), as messages show it; '' gives the store's own."""
        return f"{self.url.rstrip('/')}/{key}" if key else self.url

    def local_path(self, key: str) -> str | None:
        """The key's path on this machine's file system, None where the store is elsewhere."""
        return self.path(key) if self._is_local else None

    def check_writable(self) -> None:
        """Write, read back and delete a small hidden file, giving up within about 20 seconds.

        Makes the folder of a local store. Raises StoreError that says why the store cannot be used.
        """
        data = uuid.uuid4().hex.encode()
        with self._explained("", "use"):
            fs, root = filesystem_of(self.url, self._scheme, patient=False), self.path("")
            path = f"{root.rstrip('/')}/{TEMPORARY}{data.decode()}"
            if self._is_local:
                os.makedirs(root, exist_ok=True)
            fs.pipe_file(path, data)
            found = fs.cat_file(path)
            fs.rm_file(path)
        if found != data:
            raise StoreError(
                f"{self.url} returned other bytes than were written: check the server behind it"
            )

    def exists(self, key: str) -> bool:
        """Whether there is a file with this key; a folder is none."""
        try:
            self.size(key)
        except StoreKeyError:
            return False
        return True

    def is_file(self) -> bool:
        """Whether the URL itself is one file, and so no store."""
        with self._explained("", "read"):
            return bool(self.fs.isfile(self.path("")))

    def size(self, key: str) -> int:
        """Bytes of the file."""
        path = self.path(_checked(key))
        with self._reading(key):
            info = self.fs.info(path)
            if info["type"] != "file":
                raise IsADirectoryError(key)
            return int(info["size"])

    def read(self, key: str) -> bytes:
        """The whole file."""
        path = self.path(_checked(key))
        with self._reading(key):
            return bytes(self.fs.cat_file(path))

    def read_many(self, keys: Sequence[str]) -> list[bytes]:
        """Whole files, in the order of the keys; several requests are under way at a time. All are
        held in memory.

        For files that others have named: what `keys` lists is read, whatever characters are in it.
        """
        with ThreadPoolExecutor(1 if self._is_local else _READERS) as pool:
            return list(pool.map(self._read_listed, keys))

    def _read_listed(self, key: str) -> bytes:
        with self._reading(key):
            return bytes(self.fs.cat_file(f"{self.path('').rstrip('/')}/{key}"))

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes start..stop-1; for an empty range the store is not asked.

        Raises StoreError where the file ends before `stop`, ValueError unless 0 <= start <= stop.
        """
        path = self.path(_checked(key))
        if not 0 <= start <= stop:
            raise ValueError(f"not a byte range: {start}..{stop}")
        if start == stop:
            return b""
        with self._reading(key):
            data = bytes(self.fs.cat_file(path, start=start, end=stop))
            if len(data) != stop - start:
                raise OSError(
                    f"bytes {start}..{stop} were asked for, {len(data)} came: the file is too short"
                )
            return data

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Bytes from `start` on until `buffer` is full; of a local file without a copy. Raises as
        `read_range`.
        """
        if not self._is_local:
            buffer[:] = self.read_range(key, start, start + len(buffer))
            return
        path = self.path(_checked(key))
        with self._reading(key), open(path, "rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise OSError(
                        f"bytes {start}..{start + len(buffer)} were asked for, {done} came: the file is too "
                        f"short"
                    )
                done += count

    def write(self, key: str, data: bytes) -> None:
        """Create or replace the file, atomically."""
        path = self.path(_checked(key))
        with self._explained(key, "write"):
            if self._is_local:
                with local_writer(path) as file:
                    file.write(data)
            else:
                self.fs.pipe_file(path, data)

    def download(self, key: str, local_path: str | os.PathLike[str]) -> None:
        """Copy the file to a path of this machine, whose folder is made; the path appears only when
        it is complete.
        """
        path = self.path(_checked(key))
        copy = shutil.copyfile if self._is_local else self.fs.get_file
        with (
            self._explained(key, "download"),
            published_file(os.fspath(local_path)) as temporary,
            self._reading(key),
        ):
            copy(path, temporary)

    def keys(self, prefix: str = "") -> list[str]:
        """All keys in the folder `prefix` and below (or `prefix` itself, if a file), sorted; []
        where nothing is.

        A bucket that does not exist is an error, not an empty store.
        """
        path, root = self.path(prefix.rstrip("/")), self.path("").rstrip("/") + "/"
        with self._explained(prefix, "list"):
            found = files_below(path) if self._is_local else self.fs.find(path)
        keys = (
            name.removeprefix(root)
            for name in found
            if name.startswith(root) and not name.endswith("/")
        )
        return sorted(key for key in keys if not key.rpartition("/")[2].startswith(TEMPORARY))

    def delete(self, key_or_prefix: str) -> None:
        """Delete a file, or a folder and all in it (in no particular order); no error where there
        is nothing.
        """
        path = self.path(_checked(key_or_prefix))
        with self._explained(key_or_prefix, "delete"):
            if self._is_local:
                delete_local(path)
                return
            paths = [self.path(key) for key in self.keys(key_or_prefix)]
            # A request for each key: s3fs drops the errors of a bulk deletion, and takes '*' in a
            # key for a pattern.
            with ThreadPoolExecutor(_DELETERS) as pool:
                for _ in pool.map(_remote_delete, repeat(self.fs), paths):
                    pass

    def read_json(self, key: str) -> Any:
        """The file as JSON. Raises StoreError where it is none."""
        data = self.read(key)
        try:
            return json.loads(data)
        except ValueError as error:
            raise StoreError(
                f"{self.where(key)} is not JSON ({error}): delete it and make it again"
            ) from error

    def write_json(self, key: str, obj: Any) -> None:
        """Write as JSON: equal objects give equal bytes. Raises ValueError for NaN and infinity,
        which JSON has not.
        """
        text = json.dumps(obj, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
        self.write(key, f"{text}\n".encode())

    @contextmanager
    def _explained(self, key: str, action: str) -> Iterator[None]:
        """Turn errors of the storage into StoreError."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            foreign = self._scheme not in ("file", "s3")  # its library may raise anything
            if (
                isinstance(error, (OSError, ValueError)) or library_code(error) or foreign
            ):  # ValueError: an endpoint
                self._explain(error, key, action)
            raise

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        """As `_explained`; that there is nothing, or no file, becomes StoreKeyError."""
        with self._explained(key, "read"):
            try:
                yield
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                if library_code(error) == "NoSuchBucket":
                    raise
                raise StoreKeyError(f"no such key: {self.where(key)}") from error

    def _explain(self, error: Exception, key: str, action: str) -> NoReturn:
        way_out = WAYS_OUT.get(library_code(error)) or WAYS_OUT.get(type(error).__name__)
        detail = str(error) or type(error).__name__
        reason = f"{way_out} ({detail})" if way_out else detail
        raise StoreError(f"cannot {action} {self.where(key)}: {reason}") from error


def _parse(url: str) -> tuple[str, str]:
    """The normalised URL (for a local store the absolute path) and its scheme."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url or re.match(r"\w+:/", url):  # s3:/bucket would else become a folder
            raise StoreError(
                f"not a store URL: {url!r}; use a folder, s3://bucket/prefix or a URL fsspec knows"
            )
        scheme, rest = "file", url
    if scheme not in fsspec.available_protocols():
        raise StoreError(
            f"unknown scheme {scheme!r} in {url!r}; use a folder, s3://bucket/prefix or one fsspec knows"
        )
    if scheme in ("file", "local"):
        return os.path.abspath(os.path.expanduser(rest)), "file"
    scheme = "s3" if scheme == "s3a" else scheme
    if scheme == "s3" and not rest.strip("/"):
        raise StoreError(f"no bucket in {url!r}: use s3://bucket/prefix")
    return f"{scheme}://{rest.rstrip('/')}", scheme


def _checked(key: str) -> str:
    """The key itself; ValueError unless it means one place below the root on every kind of
    storage.
    """
    parts = key.split("/")
    if (
        not key.isprintable()
        or "\\" in key
        or "?" in key
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise ValueError(
            f"not a key: {key!r}; a key is relative, with '/' between names, without '.', '..', '\\', '?'"
        )
    if any(part.startswith(TEMPORARY) for part in parts):
        raise ValueError(f"not a key: {key!r}; names that begin with {TEMPORARY} are reserved")
    return key


def _remote_delete(fs: Any, path: str) -> None:
    with suppress(FileNotFoundError):  # another process may delete the same folder
        fs.rm_file(path)
