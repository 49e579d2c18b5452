"""The exceptions that users see as a plain message."""

from __future__ import annotations


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
