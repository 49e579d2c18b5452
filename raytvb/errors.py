"""The exceptions that users see as a plain message."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class UserError(Exception):
    """Bad input or a missing resource.

    The text names what is wrong and what the user can do. The command line prints only this text.
    """


@dataclass(frozen=True)
class FailedPart:
    """A task, or another part of a run, that is missing from the results."""

    name: str
    stage: str
    """Where it failed: `data`, `mask`, `finetune`, `prepared`, `basis`, `images` or `evaluate`. ''
    for a task that no run has tried yet."""
    reason: str
    """One line."""
    attempts: int = 1
    """How often it was tried."""

    def __str__(self) -> str:
        stage = f"{self.stage}: " if self.stage else ""
        tried = f" ({self.attempts} attempts)" if self.attempts > 1 else ""
        return f"{self.name}: {stage}{self.reason}{tried}"


class PartialRunError(UserError):
    """Parts of a run are missing. Everything else is done and stored.

    It is raised after all other work. The command line then ends with the exit code 3.
    """

    def __init__(
        self, message: str, failed: Sequence[FailedPart], *, has_results: bool = True
    ) -> None:
        """message: what was done. failed: what is missing, and why. has_results: whether anything
        could be built without it.
        """
        super().__init__(message, failed)
        self.message = message
        self.failed = tuple(failed)
        self.has_results = has_results

    def __str__(self) -> str:
        lines = "".join(f"\n  {part}" for part in self.failed)
        return (
            f"{self.message}{lines}\n"
            f"Once the cause is removed, run the same command again: it makes only what is missing."
        )


class VectorError(ValueError):
    """A vector, mask or basis file that cannot be used, or vectors that do not belong together.

    The message is the reason, then the remedy. The error survives pickling, so workers can raise
    it.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        """reason: what is wrong, with the names of the files.

        remedy: what the user can do about it; '' if only the caller knows.
        """
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason

    def with_remedy(self, remedy: str) -> VectorError:
        """The same reason with this remedy, or the error itself if it already has a remedy."""
        return self if self.remedy else VectorError(self.reason, remedy)


def raised_at(error: BaseException, file: str = "") -> str:
    """Where an error was raised, as in `basis.py:12`.

    This is the innermost line in `file`, or the innermost of all if none is in that file. '' for an
    error without a traceback.
    """
    places = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        places.append((frame.f_code.co_filename, line))
    places = [place for place in places if place[0] == file] or places
    return f"{places[-1][0]}:{places[-1][1]}" if places else ""


def described(error: BaseException) -> str:
    """The type and the text of an error of any kind, as in `KeyError: 'svd'`."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def shortened(value: object, most: int = 60) -> str:
    """A value of an input as it is shown in a message: at most about `most` characters.

    Text is in quotes; true, false and null are as in YAML and JSON.
    """
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() if abs(value) >= 10**most:
            return f"a number of about {round(value.bit_length() * 0.30103):,} digits"
        case str():
            return _quoted(value) if len(value) <= most else f"{_quoted(value[: most - 1])}…"
        case list() | tuple():
            return f"[{_shortened_items([shortened(item, most) for item in value[:9]], most)}]"
        case dict():
            items = [f"{key!s:.30}: {shortened(value[key], most)}" for key in list(value)[:9]]
            return f"{{{_shortened_items(items, most)}}}"
        case _:
            text = repr(value)
            return text if len(text) <= most else f"{text[: most - 1]}…"


def shown(name: str) -> str:
    """A name that a file system gave, for a message: bytes that are no text, and line breaks, are
    escaped.
    """
    return name if name.isprintable() else repr(name)[1:-1]


def _quoted(text: str) -> str:
    """Text in quotes, as people write it: `'C:\\data'` with one backslash."""
    return f"'{text}'" if text.isprintable() and "'" not in text else repr(text)


def _shortened_items(items: Sequence[str], most: int) -> str:
    text = ", ".join(items)
    return text if len(text) <= most and len(items) < 9 else f"{text[: most - 1]}…"


def listed(names: Iterable[object], most: int = 10, longest: int = 80) -> str:
    """Names for a message, the first few of many: `a, b, … and 12 more`.

    longest: number of characters of a name that are shown.
    """
    texts = [shown(str(name)[:longest]) for name in names]
    more = f", … and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
