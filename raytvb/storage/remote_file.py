"""A file of a remote store, open for reading, for libraries that want a file object."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO

READ_AHEAD_BYTES = 2**23
"""Bytes of a request. Libraries read a few kilobytes at a time, and a request takes some 30 ms."""


class _RemoteFile(io.RawIOBase):
    """Ranges of a file as an unbuffered file object."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read = read
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be read at any position."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, which may be behind the end. Takes no request."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"not a position in a file: {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read the next bytes. One request; none at the end of the file."""
        count = max(0, min(len(buffer), self._size - self._position))
        if count:
            buffer[:count] = self._read(self._position, self._position + count)
            self._position += count
        return count


def open_remote(read: Callable[[int, int], bytes], size: int) -> BinaryIO:
    """A buffered file object of a remote file.

    read: the bytes from a position up to another. size: of the file in bytes.
    """
    return io.BufferedReader(_RemoteFile(read, size), READ_AHEAD_BYTES)
