"""The one error for files of a store that are damaged or missing."""

from __future__ import annotations

from raytvb.errors import VectorError
from raytvb.storage.store_errors import StoreError

REPAIR = "`raytvb verify STORE --repair` removes what is damaged; then run again to make it anew"
"""What a user can do about a damaged file."""


class DamagedError(VectorError, StoreError):
    """A file of a store that is not what its record says, or that is no record at all.

    The message names the file and says what the user can do. To read the file again does not help,
    so nothing repeats what ended in this error.
    """

    def __init__(self, reason: str, remedy: str = REPAIR) -> None:
        """As `VectorError`."""
        super().__init__(reason, remedy)


def unreadable(where: str, problem: str) -> DamagedError:
    """The error for a file that cannot be read. `where` names it, `problem` says what is wrong."""
    return DamagedError(f"{where} cannot be read: {problem}")


def differs(where: str, url: str, problem: str) -> DamagedError:
    """The error for a file that is not as its record says.

    where: names the file. url: of its store. problem: what is wrong, as in `it is missing`.
    """
    remedy = REPAIR.replace("STORE", url)
    return DamagedError(f"{where} is not as its record says: {problem}", remedy)
