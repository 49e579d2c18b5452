"""The files under the URL of a task's data, and what is left out of them."""

from __future__ import annotations

import os
import posixpath
import stat
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from raytvb.errors import listed, shown
from raytvb.storage.retries import repeated
from raytvb.storage.store import Store
from raytvb.storage.store_errors import explained

HIDDEN = "hidden files and folders"
BROKEN = "broken links"
LINKED = "links to files and folders that are read already"
SPECIAL = "neither files nor folders"


@dataclass
class Listing:
    """The files of a place by their keys, sorted, and the number of those that are left out."""

    keys: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """By the reason in a few words."""
    warnings: list[str] = field(default_factory=list)

    def leave_out(self, keys: list[str], reason: str) -> None:
        """Count files that are not read, by their ending."""
        for key in keys:
            ending = posixpath.splitext(key)[1].lower() or "without an ending"
            self.left_out[f"{reason} ({ending:.20})"] += 1


def list_data(store: Store) -> Listing:
    """All files under the URL that are not hidden, every real file once.

    In a folder of this machine symbolic links are followed. A link is left out if its target is
    missing, is neither a file nor a folder, or is read already; files under their own names come
    first. Raises StoreError for a place that cannot be read.
    """
    if store.is_local and not store.is_file():
        with explained(f"cannot list {store.url}"):
            return _Walk(store.path("")).listing()
    listing, keys = Listing(), store.keys()
    if not keys and not store.is_local:
        _ask(store)
    for key in keys:
        if any(map(_is_hidden, key.split("/"))):
            listing.left_out[HIDDEN] += 1
        else:
            listing.keys.append(key)
    return listing


def _ask(store: Store) -> None:
    """Raise StoreError if a place cannot be listed. Of some schemes fsspec then finds no files."""

    def look() -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            store.fs.ls(store.path(""), detail=False)

    with explained(f"cannot list {store.url}", anything=True):
        repeated(look)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


class _Walk:
    """A walk through a folder that visits every real file once."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._listing = Listing()
        self._folders = set[tuple[int, int]]()
        """Device and number of the folders that are listed already."""
        self._linked_folders: list[str] = []
        self._linked_files: list[tuple[str, tuple[int, int]]] = []
        self._doubled: list[str] = []
        """Links to folders that are listed already and do not lie above the link."""

    def listing(self) -> Listing:
        """The files. Real ones come first, then linked folders, then links to single files."""
        self._enter(self._root)
        for link in self._linked_folders:  # grows while it is read
            self._enter(link)
        self._add_linked_files()
        self._listing.keys.sort()
        if self._doubled:
            self._listing.warnings.append(
                f"links to folders that are read already are left out: {listed(self._doubled)}"
            )
        return self._listing

    def _enter(self, top: str) -> None:
        pending = [top]
        while pending:
            folder = pending.pop()
            try:
                number = _number(os.stat(folder))
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except (FileNotFoundError, NotADirectoryError):
                continue  # there is none, or not any more
            if number in self._folders:
                self._listing.left_out[LINKED] += 1
                if not _leads_upwards(folder):
                    self._doubled.append(shown(self._key(folder)))
                continue
            self._folders.add(number)
            for entry in entries:
                if _is_hidden(entry.name):
                    self._listing.left_out[HIDDEN] += 1
                elif entry.is_symlink():
                    self._sort_link(entry.path)
                elif entry.is_dir():
                    pending.append(entry.path)
                elif entry.is_file():
                    self._add(entry.path)
                else:
                    self._listing.left_out[SPECIAL] += 1

    def _sort_link(self, path: str) -> None:
        try:
            status = os.stat(path)
        except OSError:  # a missing target, a circle, a folder on the way that may not be read
            self._listing.left_out[BROKEN] += 1
            return
        if stat.S_ISDIR(status.st_mode):
            self._linked_folders.append(path)
        elif stat.S_ISREG(status.st_mode):
            self._linked_files.append((path, _number(status)))
        else:
            self._listing.left_out[SPECIAL] += 1

    def _add_linked_files(self) -> None:
        read = set[tuple[int, int]]()
        for path, number in self._linked_files:
            folder, name = os.path.split(os.path.realpath(path))
            is_listed = not _is_hidden(name) and _number(os.stat(folder)) in self._folders
            if is_listed or number in read:
                self._listing.left_out[LINKED] += 1
                continue
            read.add(number)
            self._add(path)

    def _add(self, path: str) -> None:
        self._listing.keys.append(self._key(path))

    def _key(self, path: str) -> str:
        return path.removeprefix(f"{self._root.rstrip('/')}/")


def _leads_upwards(link: str) -> bool:
    """Whether a symbolic link leads to a folder that it lies in."""
    folder, target = os.path.realpath(os.path.dirname(link)), os.path.realpath(link)
    return folder == target or folder.startswith(f"{target}/")


def _number(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
