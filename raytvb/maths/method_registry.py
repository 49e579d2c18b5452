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

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, ClassVar, Generic, TypeVar

from raytvb.errors import described, raised_at
from raytvb.plugins import import_plugins

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
"""The form of a method's name, which becomes part of keys in a store and of command line options.
"""


class MethodError(ValueError):
    """A method raised an error, or returned what it must not return.

    The text names the method and its place, what it did, and what to do. The same call would fail
    again, so nothing repeats it.
    """


@dataclass(frozen=True)
class Method:
    """The fields that every registered method has."""

    kind: ClassVar[str]
    """What messages call such a method."""
    name: str
    summary: str
    """What the method does, in one line."""
    place: str
    """File and line of the method's function."""
    origin: str
    """Module and qualified name of the method's function."""

    def fault(self, what: str, remedy: str) -> MethodError:
        """The error that says what the method did, and what to do about it."""
        return MethodError(f"{self.kind} {self.name!r} ({self.place}) {what}; {remedy}")

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What the method's function returns. Raises MethodError if the function raises anything.

        function: the method's own, or another one of its functions.
        """
        try:
            return function(*args, **options)
        except (Exception, SystemExit) as error:  # the function is the user's: it may raise any
            refused = _refused_arguments(function, args, options)
            if isinstance(error, TypeError) and refused:
                keywords = f" and the keyword arguments {', '.join(options)}" if options else ""
                raise self.fault(
                    f"cannot be called: {refused}",
                    f"its function must take {len(args)} positional arguments{keywords}",
                ) from error
            where = raised_at(error, place_of(function).rpartition(":")[0])
            raise self.fault(
                f"raised {described(error)} [{where}]", "correct the method, or leave it out"
            ) from error


def _refused_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]
) -> str:
    """Why a function cannot be called with these arguments; '' if it can, or if nobody knows."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""  # a function that is not written in Python
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        return str(error)
    return ""


Entry = TypeVar("Entry", bound=Method)


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Methods of one kind by name, in alphabetical order.

    The first access imports the built-in methods and the user's plugins.
    """

    def __init__(self, kind: str, package: str, reserved: tuple[str, ...]) -> None:
        """kind: what messages call such a method. package: that of the built-in methods.

        reserved: words that no name may begin with, because results of a search have them in their
        names.
        """
        self._kind, self._package, self._reserved = kind, package, reserved
        self._entries: dict[str, Entry] = {}
        self._has_built_in = False
        self._complete = False

    def add(self, entry: Entry) -> None:
        """Register a method.

        A definition that runs again (a reloaded module, a cell of a notebook, edited or not)
        replaces itself. Raises ValueError if another definition has the name, if the name is not
        lower-case words with hyphens between them, and if it begins with a reserved word.
        """
        if not entry.origin.startswith(f"{self._package}."):
            # The built-in methods come first, so that their names are always taken.
            self._load_built_in()
        if not NAME.fullmatch(entry.name):
            raise ValueError(
                f"{self._kind} {entry.name!r} ({entry.place}): a name is lower-case letters and "
                f"digits, with single hyphens between words"
            )
        for word in self._reserved:
            if f"{entry.name}-".startswith(f"{word}-"):
                raise ValueError(
                    f"{self._kind} {entry.name!r} ({entry.place}): no name may begin with "
                    f"{word!r}, for the search would confuse its results with others"
                )
        other = self._entries.get(entry.name)
        if other is not None and not _is_same_definition(entry, other):
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

    def _load_built_in(self) -> None:
        if not self._has_built_in:
            for module in pkgutil.iter_modules(import_module(self._package).__path__):
                import_module(f"{self._package}.{module.name}")
            self._has_built_in = True

    def _loaded(self) -> dict[str, Entry]:
        if not self._complete:
            self._load_built_in()
            import_plugins()
            self._complete = True
        return self._entries

    def __getitem__(self, name: str) -> Entry:
        return self._loaded()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._loaded()))

    def __len__(self) -> int:
        return len(self._loaded())


def _is_same_definition(entry: Method, other: Method) -> bool:
    """Whether two registrations come from one definition that ran twice."""
    # An edited cell of a notebook has another place each time. Its module is always __main__.
    is_cell = entry.origin.startswith("__main__.") and entry.origin == other.origin
    return entry.place == other.place or is_cell


def described_type(value: object) -> str:
    """What a value is, as messages call it: `None`, `a numpy array`, `a value of type str`."""
    if value is None:
        return "None"
    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
        return "a numpy array, not a tensor (torch.from_numpy converts it)"
    return f"a value of type {type(value).__name__}"


def place_of(function: Callable[..., Any]) -> str:
    """File and line of a function's definition, as in `basis.py:12`.

    A partial, a decorated function or a callable object has the place of the function behind it.
    For a function that is not written in Python: its module and name.
    """
    inner = _behind(function)
    for owner in (inner, type(inner).__call__):
        code = getattr(owner, "__code__", None)
        if code is not None:
            return f"{code.co_filename}:{code.co_firstlineno}"
    return origin_of(function)


def origin_of(function: Callable[..., Any]) -> str:
    """Module and qualified name of a function, or of the class of a callable object."""
    inner = _behind(function)
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{named.__module__}.{named.__qualname__}"


def _behind(function: Callable[..., Any]) -> Any:
    """The function inside partials and decorators such as `torch.no_grad()`."""
    inner: Any = function
    while isinstance(inner, partial) or hasattr(inner, "__wrapped__"):
        inner = inner.func if isinstance(inner, partial) else inner.__wrapped__
    return inner
