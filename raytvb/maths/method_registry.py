"""Methods by name, each registered where it is defined.

There are two registries: `basis_registry` (how T task vectors become M basis vectors) and
`merge_registry` (how T task vectors become one). The built-in methods are the modules of a folder,
one method a file; to add one, add a file. A user's own methods come from the modules that
`plugins` imports, or from any code that runs the decorator.

This module and the files of the methods are light to import. The command line can read names and
flags for `--help`, and check an experiment file, without torch, numpy, scipy or sklearn. The
methods import those when they run.
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
"""The form of a method's name, which becomes part of keys in a store and of command line options.
"""


@dataclass(frozen=True)
class Method:
    """The fields that every registered method has."""

    name: str
    summary: str
    """What the method does, in one line."""
    place: str
    """File and line of the method's function."""


Entry = TypeVar("Entry", bound=Method)


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Methods of one kind by name, in alphabetical order.

    The first access imports the built-in methods and the user's plugins.
    """

    def __init__(self, kind: str, package: str) -> None:
        """kind: what messages call such a method. package: that of the built-in methods."""
        self._kind, self._package = kind, package
        self._entries: dict[str, Entry] = {}
        self._complete = False

    def add(self, entry: Entry) -> None:
        """Register a method.

        A definition that runs again (a reloaded module, a cell of a notebook) replaces itself.
        Raises ValueError if another definition has the name, and if the name is not lower-case
        words with hyphens between them.
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
        """The method of this name. Raises a ValueError that lists the known names."""
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
