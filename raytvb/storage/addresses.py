"""URLs of stores and keys of the files in them."""

from __future__ import annotations

import errno
import os
import re
from typing import Annotated

from pydantic import AfterValidator

from raytvb.errors import shortened
from raytvb.storage.local_files import TEMPORARY
from raytvb.storage.store_errors import StoreError

IN_ONE_PROCESS = frozenset({"memory"})
"""Schemes of places that only the process that made them can see."""

READ_ONLY = frozenset(
    {"data", "git", "github", "http", "https", "libarchive", "reference", "tar", "zip"}
)
"""Schemes of places that fsspec only reads."""

WRAPPERS = frozenset(
    {
        "async_wrapper",
        "asyncwrapper",
        "blockcache",
        "cached",
        "dask",
        "dir",
        "filecache",
        "generic",
        "simplecache",
    }
)
"""Schemes that are no place, but another way to use one."""

LONGEST_URL = 4096

LONGEST_FILE_NAME = 255
"""Bytes."""

_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060\ufeff\ud800-\udfff]"
)
_VARIABLE = re.compile(r"\$\{\w+\}|\$[A-Z_][A-Z0-9_]*|%[A-Z_]{2,}%|\{\{.*?\}\}")
_WINDOWS = re.compile(r"/?[A-Za-z]:|.*\\")
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}|arn:.+")


def parse_url(url: str) -> tuple[str, str]:
    """The normalised URL (for a local store the absolute path) and its scheme.

    Raises StoreError for what is no URL or path, for an unknown scheme, and for an S3 URL without
    a bucket.
    """
    _check_text(url)
    check_variables(url)
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "file", url
        _check_path(url, url)
        if _is_broken_url(url):  # else s3:/bucket would become a folder
            raise StoreError(
                f"not a store URL: {shortened(url)}; use a folder, s3://bucket/prefix or a URL "
                f"that fsspec knows"
            )
    _check_scheme(scheme, url)
    if scheme in ("file", "local"):
        if separator and not rest.startswith(("/", "~")):  # else file://host/x would be ./host/x
            raise StoreError(
                f"{shortened(url)} names a host or a relative folder: use file:///folder with "
                f"three slashes, or a path without {scheme}://"
            )
        _check_path(rest, url)
        return os.path.abspath(os.path.expanduser(rest)), "file"
    if ".." in rest.split("/"):
        raise StoreError(f"there is a '..' in {shortened(url)}: write the URL without it")
    scheme = "s3" if scheme == "s3a" else scheme
    if scheme == "s3":
        _check_bucket(rest, url)
    return f"{scheme}://{rest.rstrip('/')}", scheme


def _is_broken_url(path: str) -> bool:
    """Whether a path was meant as a URL: `s3:/bucket`, `s3:bucket`. A folder may have a colon."""
    scheme, colon, rest = path.partition(":")
    if not colon:
        return False
    is_like_one = rest.startswith("/") and re.fullmatch(r"\w+", scheme) is not None
    return is_like_one or (_is_known(scheme) and not os.path.exists(path))


def _check_scheme(scheme: str, url: str) -> None:
    """Raise StoreError unless a scheme is that of a place."""
    if not _is_known(scheme):
        raise StoreError(
            f"unknown scheme {shortened(scheme)} in {shortened(url)}; use a folder, "
            f"s3://bucket/prefix or one that fsspec knows"
        )
    if scheme in WRAPPERS:
        raise StoreError(
            f"{scheme}:// in {shortened(url)} only wraps another place: use the URL of that place"
        )


def _is_known(scheme: str) -> bool:
    """Whether fsspec knows a scheme."""
    if scheme in ("file", "local", "s3", "s3a"):
        return True
    # Imported here, since most experiments are checked without it.
    from fsspec import available_protocols

    return scheme in available_protocols()


def check_shared(url: str, *, written: bool = False) -> None:
    """Raise StoreError unless the workers of a run could use a URL: they are other processes.

    written: whether they must write to it, as to a store.
    """
    scheme = parse_url(url)[1]
    if scheme in IN_ONE_PROCESS:
        raise StoreError(
            f"{scheme}:// is the memory of one process, and the workers of a run are others: use a "
            f"folder or s3://bucket/prefix"
        )
    if written and url.rstrip("/") in ("", "file:", "local:"):
        raise StoreError(f"{shortened(url)} is the root of the disk: name a folder in it")
    if written and scheme in READ_ONLY:
        raise StoreError(
            f"{scheme}:// can only be read, and a run writes its store: use a folder or "
            f"s3://bucket/prefix"
        )


def _check_text(url: str) -> None:
    """Raise StoreError for a URL that has been left blank or damaged on its way."""
    if not url.strip():
        raise StoreError("the URL is blank: use a folder or s3://bucket/prefix")
    if url != url.strip():
        raise StoreError(f"{shortened(url)} begins or ends with white space: remove it")
    odd = _CONTROL.search(url)
    if odd:
        raise StoreError(
            f"{shortened(url)} has a line break, or another control character or invisible one "
            f"(U+{ord(odd[0]):04X}): remove it"
        )
    if url[0] == url[-1] and url[0] in "'\"`":
        raise StoreError(f"{shortened(url)} is in quotes twice: leave the inner ones out")
    if len(url) > LONGEST_URL:
        raise StoreError(
            f"{shortened(url)} has {len(url):,} characters: use at most {LONGEST_URL:,}"
        )


def check_variables(place: str) -> None:
    """Raise StoreError for a path or URL with a variable that nobody has filled in.

    A path that exists is taken as it is: some programs make folders like `$RECYCLE.BIN`.
    """
    variable = _VARIABLE.search(place)
    if variable and not os.path.exists(os.path.expanduser(place.removeprefix("file://"))):
        raise StoreError(
            f"{shortened(place)}: the variable {variable[0]:.40} is not filled in here: write its "
            f"value, as `envsubst < FILE` does"
        )


def _check_path(path: str, url: str) -> None:
    """Raise StoreError for a path that would become another one on this machine."""
    if os.name != "nt" and _WINDOWS.match(path) and not os.path.exists(path):
        raise StoreError(
            f"{shortened(url)} is a path of Windows, and this machine runs another system: name a "
            f"folder of this machine, as in /mnt/c/data, or use s3://bucket/prefix"
        )
    if not path:
        raise StoreError(f"{shortened(url)} names no folder: use file:///folder")
    if os.path.expanduser(path).startswith("~"):
        raise StoreError(
            f"{shortened(url)}: this machine has no such user: write the path in full (./~name for "
            f"a folder that is called so)"
        )


def _check_bucket(rest: str, url: str) -> None:
    """Raise StoreError unless the part of an S3 URL behind `s3://` begins with a bucket."""
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise StoreError(f"no bucket in {shortened(url)}: use s3://bucket/prefix")
    if "@" in bucket:
        raise StoreError(
            "an s3:// URL takes no credentials: use AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not _BUCKET.fullmatch(bucket):
        raise StoreError(
            f"{shortened(bucket)} in {shortened(url)} is no name of a bucket, which has letters, "
            f"digits, '.', '-' and '_': use s3://bucket/prefix"
        )
    if "?" in prefix:
        raise StoreError(f"there is a '?' in {shortened(url)}: use s3://bucket/prefix without it")


def check_lengths(path: str) -> None:
    """Raise OSError if no disk could hold a file of this path."""
    longest = max(len(os.fsencode(name)) for name in path.split("/"))
    if longest > LONGEST_FILE_NAME or len(os.fsencode(path)) > LONGEST_URL:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)


def checked_key(key: str) -> str:
    """The key itself, if it is valid.

    Raises ValueError unless the key means one place below the root on every kind of storage.
    """
    names = key.split("/")
    characters_are_safe = key.isprintable() and "\\" not in key and "?" not in key
    if not characters_are_safe or any(name in ("", ".", "..") for name in names):
        raise ValueError(
            f"not a key: {key!r}; a key is relative, with '/' between names, without '.', '..', "
            f"'\\', '?'"
        )
    if any(name.startswith(TEMPORARY) for name in names):
        raise ValueError(f"not a key: {key!r}; names that begin with {TEMPORARY} are reserved")
    return key


def is_key(key: str) -> bool:
    """Whether `checked_key` accepts a key. Another program may have named a file otherwise."""
    try:
        checked_key(key)
    except ValueError:
        return False
    return True


Key = Annotated[str, AfterValidator(checked_key)]
"""A key in a file of JSON, as `checked_key`."""
