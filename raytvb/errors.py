"""The exceptions that users see as a plain message."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a missing resource: its text names the thing and the way out, and the CLI prints
    it alone.
    """


class VectorError(ValueError):
    """A vector or mask file that cannot be used, or vectors that do not belong together; the
    message names them.
    """
