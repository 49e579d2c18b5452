"""URLs of stores and keys of the files in them."""

from __future__ import annotations

import os
import re
from typing import Annotated

import fsspec
from pydantic import AfterValidator

from raytvb.storage.local_files import TEMPORARY
from raytvb.storage.store_errors import StoreError


def parse_url(url: str) -> tuple[str, str]:
    """The normalised URL (for a local store the absolute path) and its scheme.

    Raises StoreError for an unknown scheme and for an S3 URL without a bucket.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url or re.match(r"\w+:/", url):  # else s3:/bucket would become a folder
            raise StoreError(
                f"not a store URL: {url!r}; use a folder, s3://bucket/prefix or a URL fsspec knows"
            )
        scheme, rest = "file", url
    if scheme not in fsspec.available_protocols():
        raise StoreError(
            f"unknown scheme {scheme!r} in {url!r}; use a folder, s3://bucket/prefix or one that "
            f"fsspec knows"
        )
    if scheme in ("file", "local"):
        return os.path.abspath(os.path.expanduser(rest)), "file"
    scheme = "s3" if scheme == "s3a" else scheme
    if scheme == "s3" and not rest.strip("/"):
        raise StoreError(f"no bucket in {url!r}: use s3://bucket/prefix")
    return f"{scheme}://{rest.rstrip('/')}", scheme


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
