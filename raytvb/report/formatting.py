"""Formats numbers for people."""

from __future__ import annotations


def percent(share: float | None) -> str:
    """0.5 -> '50.0'; a dash for None."""
    return "–" if share is None else f"{100 * share:.1f}"


def format_bytes(size: float) -> str:
    """1234567 -> '1.23 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")
