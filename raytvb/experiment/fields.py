"""What all sections of an experiment file share."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

TINY_MODEL = "glyphs-tiny"
"""Name of the embedded suite's model."""

DEFAULT_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of the {}.")
"""Prompts of tasks that give none and do not belong to the embedded suite."""

LONGEST_NAME = 200
"""Characters of a name. The name of a file has at most 255 bytes on most disks."""

LONGEST_PLACE = 4096
"""Characters of a path or URL, as Linux allows."""

YEAR_S = 366 * 86400
"""No time that a run waits for is longer. Python's own clocks overflow at larger numbers."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_EXPONENT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]{1,9}")


@dataclass(frozen=True)
class Words:
    """What a field takes, in words. Stands in its annotation, for messages."""

    text: str


def exponent_number(value: object) -> object:
    """`1e-5` as a number: YAML 1.1 takes it for text, since it wants `1.0e-5`."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value


def _whole(value: object) -> object:
    """A float without a fraction as an int: `1e6`, `128.0`."""
    number = exponent_number(value)
    if isinstance(number, float) and math.isfinite(number) and number == int(number):
        return int(number)
    return number if isinstance(number, float) else value


def _real(value: object) -> object:
    """A whole number as a float, or as infinity, which no field allows, if it is too large."""
    number = exponent_number(value)
    if isinstance(number, int) and not isinstance(number, bool):
        return float(number) if abs(number) < 2**1023 else math.inf
    return number


Whole: TypeAlias = Annotated[int, Strict(), BeforeValidator(_whole)]
"""A whole number. Neither true nor false is one, and neither is a number in quotes."""

Real: TypeAlias = Annotated[float, Strict(), BeforeValidator(_real)]
"""A number, as `Whole`."""

Flag: TypeAlias = Annotated[bool, Strict()]
"""true or false. 0, 1 and text are not."""

Fraction = Annotated[Real, Field(gt=0.0, le=1.0)]

Rate = Annotated[Real, Field(gt=0.0, le=3e38)]
"""A learning rate, up to what float32 holds."""

Epochs = Annotated[Real, Field(gt=0.0, le=100_000.0)]

Count = Annotated[Whole, Field(ge=1, le=1_000_000)]

Seconds = Annotated[Real, Field(ge=0.0, le=float(YEAR_S))]

Seed = Annotated[Whole, Field(ge=0, lt=2**31)]

WeightDecay = Annotated[Real, Field(ge=0.0, le=1000.0)]

Smoothing = Annotated[Real, Field(ge=0.0, lt=1.0)]
"""Label smoothing of a cross entropy."""

Precision: TypeAlias = Literal["fp32", "bf16"]
"""Number format of a training."""


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError("it is blank: give a name")
    if _CONTROL.search(text):
        raise ValueError("it has a line break or another control character: remove it")
    return text


def _place(text: str) -> str:
    if not text.strip():
        raise ValueError("it is blank: give a path or URL")
    if text != text.strip():
        raise ValueError(f"{text[:60]!r} begins or ends with white space: remove it")
    if _CONTROL.search(text):
        raise ValueError(f"{text[:60]!r} has a line break or another control character: remove it")
    return text


Name: TypeAlias = Annotated[str, Field(max_length=1000), AfterValidator(_name)]
"""A name in somebody's data, such as that of a column: not blank, in one line."""

Place: TypeAlias = Annotated[str, Field(max_length=LONGEST_PLACE), AfterValidator(_place)]
"""A path or URL: not blank, in one line."""


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
