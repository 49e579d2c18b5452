"""YAML that somebody else may have written: an error for all that is no plain data."""

from __future__ import annotations

from typing import Any

import yaml

_MALFORMED = (
    yaml.YAMLError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""What the YAML package raises, for example KeyError for `!!bool maybe`."""

_MOST_VALUES = 1_000_000
"""Number of values in the document of an experiment, far beyond any real one."""

_DEEPEST = 100


class YamlTextError(ValueError):
    """Text that is not YAML, or whose values no experiment can have."""


def parse_yaml(text: str | bytes) -> Any:
    """The values in a YAML document.

    Raises YamlTextError if it is not one, and for aliases that multiply to more than a million
    values: some hundred bytes can stand for billions.
    """
    try:
        values = yaml.safe_load(text)
    except _MALFORMED as error:
        raise YamlTextError(str(error) or repr(error)) from None
    _count(values, 0, 0)
    return values


def _count(value: object, before: int, depth: int) -> int:
    """Number of values up to this one. Raises YamlTextError if there are too many."""
    before += 1
    if before > _MOST_VALUES or depth > _DEEPEST:
        raise YamlTextError("it stands for too many values, or they are nested too deeply")
    inner: list[object] = []
    if isinstance(value, dict):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, (list, set, tuple)):
        inner = [*value]
    for item in inner:
        before = _count(item, before, depth + 1)
    return before
