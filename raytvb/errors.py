"""The one exception that users see as a plain message."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a missing resource: its text names the thing and the way out, and the CLI prints it alone."""
