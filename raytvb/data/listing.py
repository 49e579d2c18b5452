"""The files under the URL of a task's data, and what is left out of them."""

from __future__ import annotations

import os
import posixpath
import stat
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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

_SYSTEM = (".", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
"""How the names begin of what systems keep for themselves: previews, deleted files."""

MOST_NAMES = 1_000_000
"""Number of other names of files, through links, that are kept."""


@dataclass
class Listing:
    """The files of a place by their keys, and the number of those that are left out."""

    keys: list[str] = field(default_factory=list)
    """Sorted. Every real file is there once."""
    other_names: dict[str, str] = field(default_factory=dict)
    """Keys, through symbolic links, of files that `keys` has under another name."""
    left_out: Counter[str] = field(default_factory=Counter)
    """By the reason in a few words."""
    warnings: list[str] = field(default_factory=list)
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the files of another machine, by key; empty for a folder of this one."""
    _folder_links: list[str] = field(default_factory=list)

    def leave_out(self, keys: Sequence[str], reason: str) -> None:
        """Count files that are not read, by their ending."""
        for key in keys:
            ending = shown(posixpath.splitext(key)[1].lower()) or "without an ending"
            self.left_out[f"{reason} ({ending:.20})"] += 1

    def name_files(self, is_used: Callable[[str], bool]) -> None:
        """Decide under which of its names each file is read, and leave the other names out.

        A file's own name is taken, unless it is not used and one through a link is. is_used:
        whether a key is that of a part of the data that a split takes.
        """
        names: dict[str, list[str]] = {}
        for name, key in self.other_names.items():
            names.setdefault(key, []).append(name)
        renamed: dict[str, str] = {}
        for key, others in names.items():
            used = [name for name in sorted(others) if is_used(name)]
            if used and not is_used(key):
                renamed[key] = used[0]
        self.keys = sorted(renamed.get(key, key) for key in self.keys)
        taken = sorted(renamed.values())
        if len(self.other_names) > len(taken):
            self.left_out[LINKED] += len(self.other_names) - len(taken)
        idle = [link for link in self._folder_links if not _has_prefix(taken, f"{link}/")]
        if idle:
            links = listed(map(shown, idle))
            self.warnings.append(f"links to folders that are read already are left out: {links}")
        self.other_names = {}


def _has_prefix(names: Sequence[str], prefix: str) -> bool:
    """Whether one of sorted names begins with a prefix."""
    first = bisect_left(names, prefix)
    return first < len(names) and names[first].startswith(prefix)


def list_data(store: Store) -> Listing:
    """All files under the URL that are not hidden, every real file once.

    In a folder of this machine symbolic links are followed. A link is left out if its target is
    missing, or is neither a file nor a folder. If its target is listed under its own name, the link
    is kept as another name. Raises StoreError for a place that cannot be read.
    """
    if store.is_local and not store.is_file():
        with explained(f"cannot list {store.url}"):
            return _Walk(store.path("")).listing()
    sizes = {} if store.is_local else store.sizes()
    listing = Listing(sizes=sizes)
    if not sizes and not store.is_local:
        _ask(store)
    for key in sizes:
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
    return name.startswith(_SYSTEM)


class _Walk:
    """A walk through a folder that visits every real file once."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._listing = Listing()
        self._folders = dict[tuple[int, int], str]()
        """Keys of the folders that are listed already, by device and number."""
        self._linked_folders: list[str] = []
        self._linked_files: list[tuple[str, tuple[int, int]]] = []
        self._doubled = dict[str, str]()
        """Keys of links, and of the folders that they lead to and that are listed already."""

    def listing(self) -> Listing:
        """The files. Real ones come first, then linked folders, then links to single files."""
        self._enter(self._root)
        for link in self._linked_folders:  # grows while it is read
            self._enter(link)
        self._add_linked_files()
        self._listing.keys.sort()
        for link, folder in self._doubled.items():
            self._add_names(link, folder)
        self._listing._folder_links = [*self._doubled]
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
                self._note_again(folder, self._folders[number])
                continue
            self._folders[number] = self._key(folder)
            for entry in entries:
                if _is_hidden(entry.name):
                    self._listing.left_out[HIDDEN] += 1
                elif entry.is_symlink():
                    self._sort_link(entry.path)
                elif entry.is_dir():
                    pending.append(entry.path)
                elif entry.is_file():
                    self._listing.keys.append(self._key(entry.path))
                else:
                    self._listing.left_out[SPECIAL] += 1

    def _note_again(self, link: str, folder: str) -> None:
        """Note a link to a folder that is listed already. One that leads upwards is left out."""
        if _leads_upwards(link):
            self._listing.left_out[LINKED] += 1
        else:
            self._doubled[self._key(link)] = folder

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
        read = dict[tuple[int, int], str]()
        for path, number in self._linked_files:
            folder, name = os.path.split(os.path.realpath(path))
            place = self._folders.get(_number(os.stat(folder)))
            if place is not None and not _is_hidden(name):
                read[number] = f"{place}/{name}".lstrip("/")
            if number in read:
                self._listing.other_names[self._key(path)] = read[number]
                continue
            read[number] = self._key(path)
            self._listing.keys.append(read[number])

    def _add_names(self, link: str, folder: str) -> None:
        """Add the names that the files of a folder have through a link to the folder."""
        keys = self._listing.keys
        prefix = f"{folder}/" if folder else ""
        for index in range(bisect_left(keys, prefix), len(keys)):
            if not keys[index].startswith(prefix) or len(self._listing.other_names) >= MOST_NAMES:
                return
            name = f"{link}/{keys[index].removeprefix(prefix)}"
            self._listing.other_names[name] = keys[index]

    def _key(self, path: str) -> str:
        return path.removeprefix(self._root.rstrip("/")).lstrip("/")


def _leads_upwards(link: str) -> bool:
    """Whether a symbolic link leads to a folder that it lies in."""
    folder, target = os.path.realpath(os.path.dirname(link)), os.path.realpath(link)
    return folder == target or folder.startswith(f"{target}/")


def _number(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
