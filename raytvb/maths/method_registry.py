"""Methods by name, each registered where it is defined.

There are two registries: `basis_registry` (how T task vectors become M basis vectors) and
`merge_registry` (how T task vectors become one). The built-in methods are the modules of a folder,
one method a file; to add one, add a file. A user's own methods come from the modules that
`plugins` imports, or from any code that runs the decorator.

Everything here is light, the files of the methods too: the command line reads names and flags for
`--help`, and an experiment file is checked, without torch, numpy, scipy or sklearn. Those are
imported by the methods when they run.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar

from raytvb.plugins import import_plugins

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
"""Names of methods: they are parts of keys in a store, and of options on the command line."""


@dataclass(frozen=True)
class Method:
    """What every registered method has."""

    name: str
    summary: str
    """What it does, in a line."""
    place: str
    """File and line of its function."""


Entry = TypeVar("Entry", bound=Method)


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Methods of one kind by name, in alphabetical order.

    The first look imports the built-in methods and the user's plugins.
    """

    def __init__(self, kind: str, package: str) -> None:
        """kind: what messages call such a method. package: the folder of the built-in ones."""
        self._kind, self._package = kind, package
        self._entries: dict[str, Entry] = {}
        self._complete = False

    def add(self, entry: Entry) -> None:
        """Register a method.

        The same definition, run again (a reloaded module, a cell of a notebook), replaces itself.
        Raises ValueError for a name that another definition has, and for a name that is no
        lower-case words with hyphens between them.
        """
        if not NAME.fullmatch(entry.name):
            raise ValueError(
                f"{self._kind} {entry.name!r} ({entry.place}): a name is lower-case letters and "
                f"digits, with single hyphens between words"
            )
        other = self._entries.get(entry.name)
        if other is not None and other.place != entry.place:
            raise ValueError(
                f"two definitions of the {self._kind} {entry.name!r}: {other.place} and "
                f"{entry.place}"
            )
        self._entries[entry.name] = entry

    def lookup(self, name: str) -> Entry:
        """The method of this name. Raises ValueError that lists the names there are."""
        entry = self._loaded().get(name)
        if entry is None:
            raise ValueError(f"unknown {self._kind} {name!r}; there are: {', '.join(self)}")
        return entry

    def _loaded(self) -> dict[str, Entry]:
        if not self._complete:
            for module in pkgutil.iter_modules(import_module(self._package).__path__):
                import_module(f"{self._package}.{module.name}")
            import_plugins()
            self._complete = True
        return self._entries

    def __getitem__(self, name: str) -> Entry:
        return self._loaded()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._loaded()))

    def __len__(self) -> int:
        return len(self._loaded())


def place_of(function: Callable[..., Any]) -> str:
    """File and line of a function's definition, as in `basis.py:12`."""
    code = function.__code__
    return f"{code.co_filename}:{code.co_firstlineno}"
