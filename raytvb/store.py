"""Where experiments live: one URL (a folder, s3://bucket/prefix, any fsspec scheme) that holds files under string keys.

The only module that imports fsspec. What it adds: a key is either there in full or not there, listings are never
stale, a store pickles as its URL, and an error says which key of which store it is about and the way out.

S3 takes endpoint and credentials from the usual AWS variables. A writer that was killed leaves no key but may leave
bytes: a hidden temporary file in a folder, an unfinished upload in a bucket (a lifecycle rule removes those).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import repeat
from typing import Any, BinaryIO, NoReturn

import fsspec
import fsspec.asyn

_TEMPORARY = ".raytvb-tmp-"  # names that begin so are in no listing
_PART_BYTES = 8 * 2**20  # what a streaming writer holds; S3's 10 000 parts then allow 80 GB a file
_DELETERS = 8
_READERS = 16
_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs")
_VARIABLES = "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION"
_WAYS_OUT = {
    "NoSuchBucket": "the bucket does not exist: create it, or correct the URL or AWS_ENDPOINT_URL",
    "InvalidAccessKeyId": "the server does not know this access key: check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "wrong access key or secret: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "PermanentRedirect": "the bucket is in another region: set AWS_DEFAULT_REGION",
    "ExpiredToken": "the credentials have expired: renew them (AWS_SESSION_TOKEN)",
    "NoCredentialsError": f"no credentials found: set {_VARIABLES}, or use a role or ~/.aws",
    "EndpointConnectionError": "nothing answers at the endpoint: check AWS_ENDPOINT_URL and that the server runs",
    "ConnectTimeoutError": "the endpoint cannot be reached: check AWS_ENDPOINT_URL and the network",
    "FSTimeoutError": "the endpoint does not answer in time: check that AWS_ENDPOINT_URL is an S3 server",
    "ReadTimeoutError": "the endpoint does not answer in time: check that AWS_ENDPOINT_URL is an S3 server",
    "PermissionError": "access denied: check the permissions, or the credentials and the bucket's policy",
    "ConnectError": "the server cannot be reached: check the network and the URL",
    "ConnectionError": "the server cannot be reached: check the network and the URL",
    "RepositoryNotFoundError": "no such repository on the hub, or a private one: check the URL, set HF_TOKEN",
    "GatedRepoError": "accept the data set's terms on the hub, and set HF_TOKEN",
    "NotADirectoryError": "a part of the path is a file, not a folder: choose another place",
    "IsADirectoryError": "there is a folder of this name: choose another key, or delete the folder",
    "404": "no such bucket, or no S3 server: check the URL and AWS_ENDPOINT_URL",
    "501": "this is no S3 server: check AWS_ENDPOINT_URL",
    "ValueError": "check the URL and AWS_ENDPOINT_URL (http://host:port)",
    "InvalidRange": "the file is too short",
}


class StoreError(OSError):
    """A store cannot do what was asked; the message names the store and key, and the way out."""


class StoreKeyError(StoreError, FileNotFoundError):
    """The store has no such key."""


class Store:
    """Files under relative keys ('vectors/a/record.json') below one URL; safe in threads, workers and pickles.

    Every method that reaches the storage raises StoreError where that fails, StoreKeyError where a key to read is
    missing, and ValueError for a key that is empty, absolute, not normalised or reserved.
    """

    def __init__(self, url: str) -> None:
        """Touches no storage. A relative path is made absolute, as workers have other working directories.

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
        """The fsspec filesystem, made at first use. Raises StoreError where the scheme's package is not installed."""
        return _filesystem(self.url, self._scheme)

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
            fs, root = _filesystem(self.url, self._scheme, patient=False), self.path("")
            path = f"{root.rstrip('/')}/{_TEMPORARY}{data.decode()}"
            if self._is_local:
                os.makedirs(root, exist_ok=True)
            fs.pipe_file(path, data)
            found = fs.cat_file(path)
            fs.rm_file(path)
        if found != data:
            raise StoreError(f"{self.url} returned other bytes than were written: check the server behind it")

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
        """Whole files, in the order of the keys; several requests are under way at a time. All are held in memory.

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
                raise OSError(f"bytes {start}..{stop} were asked for, {len(data)} came: the file is too short")
            return data

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Bytes from `start` on until `buffer` is full; of a local file without a copy. Raises as `read_range`."""
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
                    raise OSError(f"bytes {start}..{start + len(buffer)} were asked for, {done} came: the file is too "
                                  f"short")
                done += count

    def write(self, key: str, data: bytes) -> None:
        """Create or replace the file, atomically."""
        path = self.path(_checked(key))
        with self._explained(key, "write"):
            if self._is_local:
                with _local_writer(path) as file:
                    file.write(data)
            else:
                self.fs.pipe_file(path, data)

    @contextmanager
    def open_writer(self, key: str) -> Iterator[BinaryIO]:
        """A binary file to write a large object piece by piece; the key appears when the block ends without an error.

        An error in the block propagates; what was there before stays.
        """
        path = self.path(_checked(key))
        writer = _local_writer(path) if self._is_local else _remote_writer(self.fs, path)
        with self._explained(key, "write"):
            file = writer.__enter__()
        try:
            yield file
        except BaseException as error:
            writer.__exit__(type(error), error, error.__traceback__)
            if isinstance(error, Exception) and _library_code(error):
                self._explain(error, key, "write")
            raise
        with self._explained(key, "write"):
            writer.__exit__(None, None, None)

    def download(self, key: str, local_path: str | os.PathLike[str]) -> None:
        """Copy the file to a path of this machine, whose folder is made; the path appears only when it is complete."""
        path = self.path(_checked(key))
        copy = shutil.copyfile if self._is_local else self.fs.get_file
        with self._explained(key, "download"), _published(os.fspath(local_path)) as temporary, self._reading(key):
            copy(path, temporary)

    def keys(self, prefix: str = "") -> list[str]:
        """All keys in the folder `prefix` and below (or `prefix` itself, if a file), sorted; [] where nothing is.

        A bucket that does not exist is an error, not an empty store.
        """
        path, root = self.path(prefix.rstrip("/")), self.path("").rstrip("/") + "/"
        with self._explained(prefix, "list"):
            found = _local_files(path) if self._is_local else self.fs.find(path)
        keys = (name.removeprefix(root) for name in found if name.startswith(root) and not name.endswith("/"))
        return sorted(key for key in keys if not key.rpartition("/")[2].startswith(_TEMPORARY))

    def delete(self, key_or_prefix: str) -> None:
        """Delete a file, or a folder and all in it (in no particular order); no error where there is nothing."""
        path = self.path(_checked(key_or_prefix))
        with self._explained(key_or_prefix, "delete"):
            if self._is_local:
                _local_delete(path)
                return
            paths = [self.path(key) for key in self.keys(key_or_prefix)]
            # A request for each key: s3fs drops the errors of a bulk deletion, and takes '*' in a key for a pattern.
            with ThreadPoolExecutor(_DELETERS) as pool:
                for _ in pool.map(_remote_delete, repeat(self.fs), paths):
                    pass

    def read_json(self, key: str) -> Any:
        """The file as JSON. Raises StoreError where it is none."""
        data = self.read(key)
        try:
            return json.loads(data)
        except ValueError as error:
            raise StoreError(f"{self.where(key)} is not JSON ({error}): delete it and make it again") from error

    def write_json(self, key: str, obj: Any) -> None:
        """Write as JSON: equal objects give equal bytes. Raises ValueError for NaN and infinity, which JSON has not."""
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
            if isinstance(error, (OSError, ValueError)) or _library_code(error) or foreign:  # ValueError: an endpoint
                self._explain(error, key, action)
            raise

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        """As `_explained`; that there is nothing, or no file, becomes StoreKeyError."""
        with self._explained(key, "read"):
            try:
                yield
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                if _library_code(error) == "NoSuchBucket":
                    raise
                raise StoreKeyError(f"no such key: {self.where(key)}") from error

    def _explain(self, error: Exception, key: str, action: str) -> NoReturn:
        way_out = _WAYS_OUT.get(_library_code(error)) or _WAYS_OUT.get(type(error).__name__)
        detail = str(error) or type(error).__name__
        reason = f"{way_out} ({detail})" if way_out else detail
        raise StoreError(f"cannot {action} {self.where(key)}: {reason}") from error


def _parse(url: str) -> tuple[str, str]:
    """The normalised URL (for a local store the absolute path) and its scheme."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url or re.match(r"\w+:/", url):  # s3:/bucket would else become a folder
            raise StoreError(f"not a store URL: {url!r}; use a folder, s3://bucket/prefix or a URL fsspec knows")
        scheme, rest = "file", url
    if scheme not in fsspec.available_protocols():
        raise StoreError(f"unknown scheme {scheme!r} in {url!r}; use a folder, s3://bucket/prefix or one fsspec knows")
    if scheme in ("file", "local"):
        return os.path.abspath(os.path.expanduser(rest)), "file"
    scheme = "s3" if scheme == "s3a" else scheme
    if scheme == "s3" and not rest.strip("/"):
        raise StoreError(f"no bucket in {url!r}: use s3://bucket/prefix")
    return f"{scheme}://{rest.rstrip('/')}", scheme


def _checked(key: str) -> str:
    """The key itself; ValueError unless it means one place below the root on every kind of storage."""
    parts = key.split("/")
    if not key.isprintable() or "\\" in key or "?" in key or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"not a key: {key!r}; a key is relative, with '/' between names, without '.', '..', '\\', '?'")
    if any(part.startswith(_TEMPORARY) for part in parts):
        raise ValueError(f"not a key: {key!r}; names that begin with {_TEMPORARY} are reserved")
    return key


def _filesystem(url: str, scheme: str, *, patient: bool = True) -> Any:
    """The filesystem of a URL, shared by the stores of a process: a client takes 0.2 s to make, and a handshake."""
    if scheme == "file":
        return fsspec.filesystem("file")
    settings = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
    # The process is in the key because fsspec's event loop does not survive a fork.
    return _client("s3://" if scheme == "s3" else url, patient, os.getpid(), tuple(settings))


@lru_cache(maxsize=16)
def _client(url: str, patient: bool, pid: int, settings: tuple[tuple[str, str], ...]) -> Any:
    if url == "s3://":
        return _s3_filesystem(patient)
    try:
        return fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)[0]
    except ImportError as error:
        raise StoreError(f"cannot use {url}: {error}") from error


def _s3_filesystem(patient: bool) -> Any:
    from s3fs import S3FileSystem  # here because it takes a second, which local stores need not wait

    class BoundedS3(S3FileSystem):  # type: ignore[misc]
        """Requests that end: aiohttp has no timeout while it sends a body or waits for '100 Continue'."""

        async def _call_s3(self, method: str, *options: Any, **arguments: Any) -> Any:
            seconds = (120 if patient else 15) + len(arguments.get("Body", b"")) / 2**19  # at least 0.5 MB/s
            return await asyncio.wait_for(super()._call_s3(method, *options, **arguments), seconds)

        call_s3 = fsspec.asyn.sync_wrapper(_call_s3)

        def __reduce__(self) -> tuple[Any, ...]:  # other processes have their own credentials and connections
            return _filesystem, ("s3://", "s3")

    # Waits of up to 1 + 2 + 4 + 8 s lie between the attempts. Many S3-compatible servers refuse the checksums that
    # botocore adds by default since 1.36.
    config = {"connect_timeout": 3, "read_timeout": 20,
              "retries": {"mode": "standard", "total_max_attempts": 5 if patient else 2},
              "request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    fs = BoundedS3(skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
    fs.retries = 2 if patient else 1  # s3fs repeats what botocore has repeated: the numbers multiply
    return fs


def _library_code(error: BaseException) -> str:
    """What an error of a client library is about: the server's code or the error's class; '' for other errors."""
    for link in (error, error.__cause__):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return type(error).__name__ if type(error).__module__.split(".")[0] in _LIBRARIES else ""


def _remote_delete(fs: Any, path: str) -> None:
    with suppress(FileNotFoundError):  # another process may delete the same folder
        fs.rm_file(path)


@contextmanager
def _remote_writer(fs: Any, path: str) -> Iterator[BinaryIO]:
    # Without autocommit closing publishes nothing, whether a library closes the file or the garbage collector.
    file = fs.open(path, "wb", block_size=_PART_BYTES, autocommit=False)
    try:
        yield file
        file.close()
        file.commit()
    except BaseException:
        file.closed = True  # else the garbage collector would upload the rest
        with suppress(Exception):  # the first error is the one to tell
            file.discard()
        raise


@contextmanager
def _local_writer(path: str) -> Iterator[BinaryIO]:
    with _published(path) as temporary, open(temporary, "xb") as file:
        yield file


@contextmanager
def _published(path: str) -> Iterator[str]:
    """A temporary path beside `path`, whose folder is made; renamed to it after the block, dropped on an error."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{_TEMPORARY}{uuid.uuid4().hex}")
    try:
        yield temporary
        _fsync(temporary)  # before the rename: else a power cut may leave the name without the bytes
        os.replace(temporary, path)
        _fsync(folder)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def _fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _local_files(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    return [os.path.join(folder, name)
            for folder, _, names in os.walk(path, onerror=_raise_unless_missing, followlinks=True) for name in names]


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _local_delete(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.remove(path)
