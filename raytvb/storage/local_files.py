"""Files of this machine, written under a temporary name and renamed when they are whole."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

TEMPORARY = ".raytvb-tmp-"
"""How the names of unfinished files begin. Listings leave such files out."""

FOLDER = "RAYTVB_FOLDER"
"""Environment variable of workers on a cluster: the driver's folder, which relative paths count
from."""


def enter_folder() -> None:
    """Change to the driver's folder, if this process has been told one and this machine has it."""
    folder = os.environ.get(FOLDER)
    if folder:
        with suppress(OSError):
            os.chdir(folder)


@contextmanager
def local_writer(path: str) -> Iterator[BinaryIO]:
    """A file to write to, which appears as `path` after the block."""
    with published_file(path) as temporary, open(temporary, "xb") as file:
        yield file


@contextmanager
def published_file(path: str) -> Iterator[str]:
    """A temporary path beside `path`. The folder is created if it is missing.

    After the block the temporary file is renamed to `path`; on an error it is deleted.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        yield temporary
        # Synced before the rename, else a power cut may leave the name without the bytes.
        _fsync(temporary)
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


def check_folder(path: str) -> None:
    """Raise OSError unless files can be written into the folder, or the folder can be created.

    Changes nothing.
    """
    folder = path
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)


def files_below(path: str) -> list[str]:
    """Paths of all files in a folder and below, or the path itself if it is a file.

    Symbolic links are followed, but no folder is entered twice through links: two that lead upwards
    would never end. Broken links, pipes, sockets and devices are left out.
    """
    if os.path.isfile(path):
        return [path]
    files, entered = list[str](), set[tuple[int, int]]()
    walk = os.walk(path, onerror=_raise_unless_missing, followlinks=True)
    for folder, folders, names in walk:
        folders[:] = [name for name in folders if _is_new(os.path.join(folder, name), entered)]
        paths = [os.path.join(folder, name) for name in names]
        files += [each for each in paths if os.path.isfile(each)]
    return files


def _is_new(folder: str, entered: set[tuple[int, int]]) -> bool:
    """Whether a folder is not a link, or one to a folder that no link has led to before."""
    if not os.path.islink(folder):
        return True
    with suppress(FileNotFoundError):
        status = os.stat(folder)
        target = (status.st_dev, status.st_ino)
        if target not in entered:
            entered.add(target)
            return True
    return False


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def sizes_below(path: str) -> dict[str, int]:
    """Size in bytes by path, of all files that `files_below` lists."""
    sizes = {}
    for name in files_below(path):
        with suppress(FileNotFoundError):  # deleted since it was listed
            sizes[name] = os.stat(name).st_size
    return sizes


def delete_local(path: str) -> None:
    """Delete a file, or a folder with everything in it. A missing path is not an error."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.remove(path)
