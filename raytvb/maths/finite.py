"""Finds the tensors with values that are NaN or infinite, so that an error can name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

NAMED = 3
"""A message names at most this many tensors."""


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with NaN or infinite values, sorted."""
    return [name for name in sorted(tensors) if not bool(tensors[name].isfinite().all())]


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are: `a, b, c and 4 more`."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
