"""Files of this machine: written beside their place and renamed to it when they are whole."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

TEMPORARY = ".raytvb-tmp-"  # names that begin so are in no listing


@contextmanager
def local_writer(path: str) -> Iterator[BinaryIO]:
    with published_file(path) as temporary, open(temporary, "xb") as file:
        yield file


@contextmanager
def published_file(path: str) -> Iterator[str]:
    """A temporary path beside `path`, whose folder is made; renamed to it after the block, dropped
    on an error.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        yield temporary
        _fsync(
            temporary
        )  # before the rename: else a power cut may leave the name without the bytes
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


def files_below(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    return [
        os.path.join(folder, name)
        for folder, _, names in os.walk(path, onerror=_raise_unless_missing, followlinks=True)
        for name in names
    ]


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def delete_local(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.remove(path)
