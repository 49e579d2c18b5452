"""Where experiments live: one URL that holds files under string keys.

The URL is a folder, s3://bucket/prefix, or has any scheme that fsspec knows. A store adds this to
fsspec: a file is either there in full or not at all, listings are never stale, a store pickles as
its URL, and an error names the store and the key and says what the user can do.

S3 takes endpoint and credentials from the usual AWS variables. A writer that was killed leaves no
key but may leave bytes: a hidden temporary file in a folder, an unfinished upload in a bucket (a
lifecycle rule removes those).

Read the room in this order. First this module and the modules it uses: `addresses` (URLs and keys),
`filesystems` (the S3 client), `local_files` (atomic writes), `store_errors`. Then `records`: a
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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from raytvb.storage.addresses import checked_key, parse_url
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
from raytvb.storage.store_errors import WAYS_OUT, StoreError, StoreKeyError, library_code

_DELETERS = 8
_READERS = 16


class Store:
    """Files under relative keys ('vectors/a/record.json') below one URL.

    A store may be used by several threads, sent to other processes, and pickled. Every method that
    uses the storage raises StoreError if that fails, StoreKeyError if a key to read is missing, and
    ValueError for a key that is empty, absolute, not normalised or reserved.
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
        with self._explained("", "read"):
            return bool(self.fs.isfile(self.path("")))

    def size(self, key: str) -> int:
        """Size of the file in bytes."""
        path = self.path(checked_key(key))
        with self._reading(key):
            info = self.fs.info(path)
            if info["type"] != "file":
                raise IsADirectoryError(key)
            return int(info["size"])

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
        with self._reading(key):
            return bytes(self.fs.cat_file(path, **options))

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes start..stop-1. An empty range takes no request.

        Raises StoreError if the file ends before `stop`, and ValueError unless 0 <= start <= stop.
        """
        path = self.path(checked_key(key))
        if not 0 <= start <= stop:
            raise ValueError(f"not a byte range: {start}..{stop}")
        if start == stop:
            return b""
        with self._reading(key):
            data = bytes(self.fs.cat_file(path, start=start, end=stop))
            if len(data) != stop - start:
                raise _too_short(start, stop, len(data))
            return data

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Read bytes from `start` on until `buffer` is full. A local file is read without a copy.

        Raises as `read_range`.
        """
        if not self.is_local:
            buffer[:] = self.read_range(key, start, start + len(buffer))
            return
        path = self.path(checked_key(key))
        with self._reading(key), open(path, "rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise _too_short(start, start + len(buffer), done)
                done += count

    def write(self, key: str, data: bytes) -> None:
        """Create or replace the file, atomically."""
        path = self.path(checked_key(key))
        with self._explained(key, "write"):
            if self.is_local:
                with local_writer(path) as file:
                    file.write(data)
            else:
                self.fs.pipe_file(path, data)

    def download(self, key: str, local_path: str | os.PathLike[str]) -> None:
        """Copy the file to a path of this machine. The path's folder is created if it is missing.

        The path appears only when the file is complete.
        """
        path = self.path(checked_key(key))
        copy = shutil.copyfile if self.is_local else self.fs.get_file
        with (
            self._explained(key, "download"),
            published_file(os.fspath(local_path)) as temporary,
            self._reading(key),
        ):
            copy(path, temporary)

    def keys(self, prefix: str = "") -> list[str]:
        """All keys in the folder `prefix` and below, sorted; [] if there are none.

        If `prefix` is a file, the result is its key. A bucket that does not exist is an error, not
        an empty store.
        """
        path = self.path(prefix.rstrip("/"))
        with self._explained(prefix, "list"):
            paths = files_below(path) if self.is_local else self.fs.find(path)
        return sorted(self._keys_of(paths))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes, by key, of the files that `keys` lists. They come from one listing."""
        path = self.path(prefix.rstrip("/"))
        with self._explained(prefix, "list"):
            if self.is_local:
                sizes = sizes_below(path)
            else:
                listing = self.fs.find(path, detail=True)
                sizes = {name: int(info["size"]) for name, info in listing.items()}
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
        with self._explained(key_or_prefix, "delete"):
            if self.is_local:
                delete_local(path)
                return
            paths = [self.path(key) for key in self.keys(key_or_prefix)]
            # One request for each key, since s3fs ignores errors of a bulk deletion and takes '*'
            # in a key as a pattern.
            with ThreadPoolExecutor(_DELETERS) as pool:
                list(pool.map(self._delete_remote, paths))

    def _delete_remote(self, path: str) -> None:
        with suppress(FileNotFoundError):  # another process may delete the same folder
            self.fs.rm_file(path)

    def read_json(self, key: str) -> Any:
        """The parsed file. Raises StoreError if it is not JSON."""
        return parse_json(self.read(key), self.where(key))

    def write_json(self, key: str, obj: Any) -> None:
        """Write an object as JSON; equal objects give equal bytes.

        Raises ValueError for NaN and infinity, which JSON does not have.
        """
        text = json.dumps(obj, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
        self.write(key, f"{text}\n".encode())

    @contextmanager
    def _explained(self, key: str, action: str) -> Iterator[None]:
        """Turn errors of the storage into a StoreError that names the action and the key."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            # Libraries of other schemes may raise anything. ValueError means a malformed endpoint.
            foreign = self._scheme not in ("file", "s3")
            if isinstance(error, (OSError, ValueError)) or library_code(error) or foreign:
                self._explain(error, key, action)
            raise

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        """As `_explained`; a missing file, or a folder in its place, becomes StoreKeyError."""
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


def _too_short(start: int, stop: int, count: int) -> OSError:
    return OSError(f"only {count} of the bytes {start}..{stop} exist: the file is too short")
