"""What all sections of an experiment file share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

TINY_MODEL = "glyphs-tiny"
"""Name of the embedded suite's model."""

DEFAULT_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of the {}.")
"""Prompts of tasks that give none and do not belong to the embedded suite."""

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]

Positive = Annotated[float, Field(gt=0.0)]

Count = Annotated[int, Field(ge=1)]


class Frozen(BaseModel):
    """A section of an experiment file: it cannot be changed, and unknown fields are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


def one_or_many(value: object) -> object:
    """The value of a field that is a list. A single value is a list of one: `sizes: 4` is `[4]`."""
    return (value,) if isinstance(value, str | int | float | dict) else value


OneOrMany = BeforeValidator(one_or_many)
"""For fields that are lists, but may be given as one value."""
