"""The exceptions that users see as a plain message."""

from __future__ import annotations

import traceback


class UserError(Exception):
    """Bad input or a missing resource.

    The text names what is wrong and what the user can do. The command line prints only this text.
    """


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
