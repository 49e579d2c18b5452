"""Sizes and shapes as files of other people state them. Numbers that no tensor has are refused."""

from __future__ import annotations

from math import prod
from typing import Annotated

from pydantic import AfterValidator, Field

LARGEST = 2**63 - 1
"""The largest size that a tensor or a file can have."""


def checked_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape itself. Raises ValueError if torch could not make a tensor of it.

    A size of 0 does not help: torch multiplies the other sizes for its strides all the same.
    """
    entries = prod(max(size, 1) for size in shape)
    if len(shape) > 64 or min(shape, default=0) < 0 or entries > LARGEST:
        raise ValueError(f"{list(shape)!r:.80} is not the shape of a tensor")
    return shape


Size = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
"""A whole number from 0 on, such as a number of bytes or of entries."""

Shape = Annotated[tuple[Size, ...], AfterValidator(checked_shape)]
"""The shape of a tensor."""
