"""Where experiments live: one URL that holds files under string keys.

The URL is a folder, s3://bucket/prefix, or has any scheme that fsspec knows. A store adds this to
fsspec: a file is either there in full or not at all, listings are never stale, a store pickles as
its URL, what fails in a way that may pass is tried again (`retries`), and an error names the store
and the key and says what the user can do.

S3 takes endpoint and credentials from the usual AWS variables. A writer that was killed leaves no
key but may leave bytes: a hidden temporary file in a folder, an unfinished upload in a bucket (a
lifecycle rule removes those).

Read the room in this order. First this module and the modules it uses: `addresses` (URLs and keys),
`filesystems` (the S3 client), `retries` and `transient` (what is tried again), `local_files`
(atomic writes), `store_errors`. Then `records`: a
thing exists when its `record.json` does. Then the tensor files: `header` (and `format_version`),
`masks`, `vectors`, `vector_set` (many vectors as one matrix, read in blocks), `basis_layout` with
`basis_writer` and `stored_basis`, and `gram_state`, the Gram matrix as it grows. `mirror`,
`block_cache` and `verify` use all of these. The modules up to `records`, and `verify`, import
neither torch nor numpy, so that a command that only looks at a store starts at once.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, BinaryIO, TypeVar

from raytvb.storage.addresses import check_lengths, checked_key, parse_url
from raytvb.storage.contract import parse_json
from raytvb.storage.filesystems import filesystem_of
from raytvb.storage.local_files import (
    TEMPORARY,
    check_folder,
    delete_local,
    files_below,
    local_writer,
    published_file,
    sizes_below,
)
from raytvb.storage.remote_file import open_remote
from raytvb.storage.retries import repeated
from raytvb.storage.store_errors import (
    InterruptedTransferError,
    StoreError,
    StoreKeyError,
    explained,
    library_code,
)

Result = TypeVar("Result")

_DELETERS = 8
_READERS = 16


class Store:
    """Files under relative keys ('vectors/a/record.json') below one URL.

    A store may be used by several threads, sent to other processes, and pickled. Every method that
    uses the storage tries again if that fails in a way that may pass, for as long as
    `retries.set_patience` has set. Then it raises StoreError. It raises StoreKeyError if a key to
    read is missing, and ValueError for a key that is empty, absolute, not normalised or reserved.
    """

    def __init__(self, url: str) -> None:
        """Touches no storage. A relative path becomes absolute, since workers run in other folders.

        Raises StoreError for an unknown scheme and for an S3 URL without a bucket.
        """
        self.url, self._scheme = parse_url(url)
        self.is_local = self._scheme == "file"
        """Whether the store is a folder of this machine's file system."""

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @property
    def fs(self) -> Any:
        """The fsspec filesystem, made at first use.

        Raises StoreError where the scheme's package is not installed.
        """
        return filesystem_of(self.url, self._scheme)

    def path(self, key: str) -> str:
        """The key's path as `fs` wants it; '' gives the root of the store."""
        root = self.url if self.is_local else str(self.fs._strip_protocol(self.url))
        return f"{root.rstrip('/')}/{checked_key(key)}" if key else root

    def where(self, key: str) -> str:
        """The key's full URL (or local path), as messages show it; '' gives the store's own."""
        return f"{self.url.rstrip('/')}/{key}" if key else self.url

    def local_path(self, key: str) -> str | None:
        """The key's path on this machine's file system; None if the store is elsewhere."""
        return self.path(key) if self.is_local else None

    def check_writable(self) -> None:
        """Write, read back and delete a small hidden file. Creates the folder of a local store.

        Gives up within about 20 seconds. Raises StoreError that says why the store cannot be used.
        """
        data = uuid.uuid4().hex.encode()
        with self._explained("", "use"):
            fs, root = filesystem_of(self.url, self._scheme, patient=False), self.path("")
            path = f"{root.rstrip('/')}/{TEMPORARY}{data.decode()}"
            if self.is_local:
                os.makedirs(root, exist_ok=True)
            fs.pipe_file(path, data)
            returned = fs.cat_file(path)
            fs.rm_file(path)
        if returned != data:
            raise StoreError(
                f"{self.url} returned other bytes than were written: check the server behind it"
            )

    def check_reachable(self) -> None:
        """Check as much of `check_writable` as can be checked without changing anything.

        A folder must be writable, or the nearest existing one above it. A server must answer;
        whether it also accepts files is not checked. Raises StoreError as `check_writable`.
        """
        with self._explained("", "use"):
            if self.is_local:
                check_lengths(self.path(""))
                check_folder(self.path(""))
            else:
                fs = filesystem_of(self.url, self._scheme, patient=False)
                fs.find(f"{self.path('').rstrip('/')}/{TEMPORARY}none")

    def exists(self, key: str) -> bool:
        """Whether there is a file with this key; a folder is not one."""
        try:
            self.size(key)
        except StoreKeyError:
            return False
        return True

    def is_file(self) -> bool:
        """Whether the URL is that of a file. Such a URL cannot be a store."""

        def look() -> bool:
            try:
                return bool(self.fs.info(self.path(""))["type"] == "file")
            except (FileNotFoundError, NotADirectoryError):
                return False

        return self._repeated("", "read", look)

    def size(self, key: str) -> int:
        """Size of the file in bytes."""
        path = self.path(checked_key(key))

        def look() -> int:
            info = self.fs.info(path)
            if info["type"] != "file":
                raise IsADirectoryError(key)
            return int(info["size"])

        return self._read(key, look)

    def read(self, key: str) -> bytes:
        """The whole file. One request."""
        return self._read_whole(key, self.path(checked_key(key)))

    def find(self, key: str) -> bytes | None:
        """The whole file, or None if the key is missing. One request."""
        try:
            return self.read(key)
        except StoreKeyError:
            return None

    def read_many(self, keys: Sequence[str]) -> list[bytes]:
        """Whole files in the order of the keys, all in memory.

        Several requests are under way at a time. Every key that `keys` lists is accepted, even one
        with characters that `write` refuses, since another program may have named the file.
        """
        with ThreadPoolExecutor(1 if self.is_local else _READERS) as pool:
            return list(pool.map(self.read_listed, keys))

    def read_listed(self, key: str) -> bytes:
        """The whole file under a key that `keys` has listed."""
        return self._read_whole(key, f"{self.path('').rstrip('/')}/{key}")

    def _read_whole(self, key: str, path: str) -> bytes:
        # By default, s3fs first requests the size, in order to read large files in several pieces.
        options = {"max_concurrency": 1} if self._scheme == "s3" else {}
        return self._read(key, lambda: bytes(self.fs.cat_file(path, **options)))

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes start..stop-1. An empty range takes no request.

        Raises StoreError if the file ends before `stop`, and ValueError unless 0 <= start <= stop.
        """
        path = self.path(checked_key(key))
        if not 0 <= start <= stop:
            raise ValueError(f"not a byte range: {start}..{stop}")
        if start == stop:
            return b""

        def read() -> bytes:
            if self.is_local and os.stat(path).st_size < stop:
                # Python would first take the memory for all bytes that are asked for.
                raise _too_short(start, stop, max(0, os.stat(path).st_size - start))
            data = bytes(self.fs.cat_file(path, start=start, end=stop))
            if len(data) != stop - start:
                self._check_length(path, stop)
                raise _too_short(start, stop, len(data))
            return data

        return self._read(key, read)

    def _check_length(self, path: str, stop: int) -> None:
        """Raise InterruptedTransferError if the file has the bytes up to `stop`, which were not
        all sent.
        """
        if not self.is_local and int(self.fs.info(path)["size"]) >= stop:
            raise InterruptedTransferError("fewer bytes arrived than the file has")

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Read bytes from `start` on until `buffer` is full. A local file is read without a copy.

        Raises as `read_range`.
        """
        if not self.is_local:
            buffer[:] = self.read_range(key, start, start + len(buffer))
            return
        path = self.path(checked_key(key))

        def read() -> None:
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                done = 0
                while done < len(buffer):
                    count = file.readinto(buffer[done:])
                    if not count:
                        raise _too_short(start, start + len(buffer), done)
                    done += count

        self._read(key, read)

    def open(self, key: str) -> BinaryIO:
        """The file, open for reading at any position. Every read of a remote file raises as
        `read_range`.
        """
        path = self.path(checked_key(key))
        if self.is_local:
            return self._read(key, lambda: open(path, "rb"))
        size = self.size(key)
        return open_remote(lambda start, stop: self.read_range(key, start, stop), size)

    def write(self, key: str, data: bytes) -> None:
        """Create or replace the file, atomically."""
        path = self.path(checked_key(key))
        write = self._write_local if self.is_local else self._write_remote
        self._repeated(key, "write", lambda: write(path, data))

    def _write_local(self, path: str, data: bytes) -> None:
        with local_writer(path) as file:
            file.write(data)

    def _write_remote(self, path: str, data: bytes) -> None:
        try:
            self.fs.pipe_file(path, data)
        except FileNotFoundError as error:
            if library_code(error) != "NoSuchUpload":
                raise
            # The answer to the last request of an upload in parts was lost. The server has ended
            # the upload, so the request cannot be repeated alone.
            raise InterruptedTransferError("the upload was interrupted at its end") from error

    def download(self, key: str, local_path: str | os.PathLike[str]) -> None:
        """Copy the file to a path of this machine. The path's folder is created if it is missing.

        The path appears only when the file is complete.
        """
        path = self.path(checked_key(key))
        copy = shutil.copyfile if self.is_local else self.fs.get_file

        def fetch() -> None:
            with published_file(os.fspath(local_path)) as temporary, self._missing(key):
                copy(path, temporary)

        self._repeated(key, "download", fetch)

    def keys(self, prefix: str = "") -> list[str]:
        """All keys in the folder `prefix` and below, sorted; [] if there are none.

        If `prefix` is a file, the result is its key. A bucket that does not exist is an error, not
        an empty store.
        """
        path = self.path(prefix.rstrip("/"))
        find = files_below if self.is_local else self.fs.find
        paths: Iterable[str] = self._repeated(prefix, "list", lambda: find(path))
        return sorted(self._keys_of(paths))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes, by key, of the files that `keys` lists. They come from one listing."""
        path = self.path(prefix.rstrip("/"))

        def listed() -> dict[str, int]:
            if self.is_local:
                return sizes_below(path)
            listing = self.fs.find(path, detail=True)
            return {name: int(info["size"] or 0) for name, info in listing.items()}

        sizes = self._repeated(prefix, "list", listed)
        keys = self._keys_of(sizes)
        return {key: sizes[keys[key]] for key in sorted(keys)}

    def _keys_of(self, paths: Iterable[str]) -> dict[str, str]:
        """The paths of a listing by their keys, without unfinished files and folder markers."""
        root = self.path("").rstrip("/") + "/"
        keys = {}
        for path in paths:
            key = path.removeprefix(root)
            hidden = key.rpartition("/")[2].startswith(TEMPORARY)
            if path.startswith(root) and not path.endswith("/") and not hidden:
                keys[key] = path
        return keys

    def delete(self, key_or_prefix: str) -> None:
        """Delete a file, or a folder and everything in it, in no particular order.

        A missing key is not an error.
        """
        path = self.path(checked_key(key_or_prefix))
        if self.is_local:
            self._repeated(key_or_prefix, "delete", lambda: delete_local(path))
            return
        # One request for each key, since s3fs ignores errors of a bulk deletion and takes '*' in a
        # key as a pattern.
        with ThreadPoolExecutor(_DELETERS) as pool:
            list(pool.map(self._delete_remote, self.keys(key_or_prefix)))

    def _delete_remote(self, key: str) -> None:
        path = self.path(key)

        def remove() -> None:
            # Another process may delete the same folder, or the answer of a first try was lost.
            with suppress(FileNotFoundError):
                self.fs.rm_file(path)

        self._repeated(key, "delete", remove)

    def read_json(self, key: str) -> Any:
        """The parsed file. Raises StoreError if it is not JSON."""
        return parse_json(self.read(key), self.where(key))

    def write_json(self, key: str, obj: Any) -> None:
        """Write an object as JSON; equal objects give equal bytes.

        Raises ValueError for NaN and infinity, which JSON does not have.
        """
        text = json.dumps(obj, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
        self.write(key, f"{text}\n".encode())

    def _read(self, key: str, call: Callable[[], Result]) -> Result:
        """As `_repeated`; a missing file, or a folder in its place, becomes StoreKeyError."""

        def read() -> Result:
            with self._missing(key):
                return call()

        return self._repeated(key, "read", read)

    def _repeated(self, key: str, action: str, call: Callable[[], Result]) -> Result:
        """The result of a call, which is repeated while it fails in a way that may pass."""
        with self._explained(key, action):
            return repeated(call)

    def _explained(self, key: str, action: str) -> AbstractContextManager[None]:
        """Turn errors of the storage into a StoreError that names the action and the key."""
        # Libraries of other schemes may raise anything.
        foreign = self._scheme not in ("file", "s3")
        return explained(f"cannot {action} {self.where(key)}", anything=foreign)

    @contextmanager
    def _missing(self, key: str) -> Iterator[None]:
        """Turn the error of a missing file, or of a folder in its place, into StoreKeyError."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            if library_code(error) == "NoSuchBucket":
                raise
            raise StoreKeyError(f"no such key: {self.where(key)}") from error


def _too_short(start: int, stop: int, count: int) -> OSError:
    return OSError(f"only {count} of the bytes {start}..{stop} exist: the file is too short")
