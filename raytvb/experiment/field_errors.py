"""The wrong fields of an experiment file, one line each: what was found, and what is allowed.

pydantic says which field is wrong and why. None of its words reach the user: what is allowed comes
from the annotation of the field (`expected`), and the rest is written here.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from raytvb.errors import UserError, shortened
from raytvb.experiment.config import Experiment
from raytvb.experiment.expected import Location, expected, field_at, kinds_of, model_at
from raytvb.experiment.fields import exponent_number
from raytvb.experiment.sections.tasks import UNKNOWN_TASK, unknown_task
from raytvb.experiment.yaml_text import Document, parse_yaml

MOST_PROBLEMS = 20
"""Lines of a message. A mistake in a script may be in each of 10,000 tasks."""


def explained(error: ValidationError, origin: str, document: Document | None) -> UserError:
    """The error of an experiment file that lists all that is wrong.

    origin: names the file. document: its values as they are written; None if it is no YAML.
    """
    problems = error.errors(include_url=False, include_context=False)
    lines = dict[str, None]()  # members of a union each give a problem about the same field
    for problem in problems:
        if not _is_consequence(problem, problems):
            lines[_line(problem, document)] = None
            if len(lines) > MOST_PROBLEMS:
                break
    shown = list(lines)[:MOST_PROBLEMS]
    if len(lines) > len(shown):
        shown.append("… and more of the kind")
    return UserError(f"{origin}: " + "\n  ".join(shown))


def _is_consequence(problem: ErrorDetails, problems: Sequence[ErrorDetails]) -> bool:
    """Whether the problem is that a list is too short only because its members are wrong."""
    location = problem["loc"]
    if problem["type"] != "too_short":
        return False
    inner = [p["loc"] for p in problems if p["loc"] != location]
    return any(other[: len(location)] == location for other in inner)


def _line(problem: ErrorDetails, document: Document | None) -> str:
    """One line: the field, what is wrong with it and what is allowed."""
    location = problem["loc"]
    path = path_of(location)
    match problem["type"]:
        case "extra_forbidden":
            return f"{path}: {_unknown_field(location)}"
        case "missing":
            return f"{path}: this field is required: {expected(field_at(location)[1])}"
        case "invalid_key":
            return f"{path}: the name of a field is text, not {shortened(location[-1])}"
        case "value_error":
            message = problem["msg"].removeprefix("Value error, ")
            return f"{path}: {message}" if location else message
        case kind if kind == UNKNOWN_TASK:
            given = problem["input"]
            name = given.get("name") if isinstance(given, dict) else given
            return f"{path}: {unknown_task(str(name))}"
        case _:
            return _wrong_value(problem, document)


def _unknown_field(location: Location) -> str:
    model, name = model_at(location[:-1]), str(location[-1])[:100].replace("-", "_")
    allowed = list(model.model_fields)
    near = difflib.get_close_matches(name, allowed, 1)
    places = [] if near else _sections_with(name)
    hint = f" (did you mean {near[0]}?)" if near else ""
    if places:
        hint = f" (it belongs in {' or '.join(places)})"
    return f"unknown field{hint}; allowed: {', '.join(allowed)}"


def _sections_with(name: str) -> list[str]:
    """The sections that have a field of this name: `finetune` for `epochs`."""
    return [
        section
        for section in Experiment.model_fields
        if section != "tasks" and name in model_at((section,)).model_fields
    ]


def _wrong_value(problem: ErrorDetails, document: Document | None) -> str:
    """A value of another type, or out of its range."""
    field, annotation = field_at(problem["loc"])
    value = problem["input"]
    if {int, float} & set(kinds_of(annotation)):
        value = exponent_number(value)
    text = None
    if document is not None and len(field) == len(problem["loc"]):
        text = document.written(field)
    if text is not None and parse_yaml(text) != value:  # a preset has moved the fields
        text = None
    found = _found(value, text)
    hint = _hint(value, text, annotation)
    return f"{path_of(field)}: found {found}; allowed: {expected(annotation)}{hint}"


def _found(value: object, text: str | None) -> str:
    """The value, with the text that it is written as if that is another one."""
    shown = shortened(value)
    if isinstance(value, bool | None) and text not in (None, "", shown, shown.capitalize()):
        return f"{shown} (written {text:.20})"
    return shown


def _hint(value: object, text: str | None, annotation: Any) -> str:
    """What to write instead, where quotes decide; '' otherwise."""
    kinds = list(kinds_of(annotation))
    if isinstance(value, str):
        if {int, float} & set(kinds) and _is_number(value):
            return f"; write {value.strip()} without quotes"
        if bool in kinds and value.lower() in ("true", "false"):
            return f"; write {value.lower()} without quotes"
    numbers = {int, float} & set(kinds) and not isinstance(value, bool)
    if isinstance(value, bool | int | float) and str in kinds and not numbers:
        return f"; if it is meant as text, put it in quotes: '{text or shortened(value)}'"
    if value is None and str in kinds:
        return "; give a value, or leave the field out"
    return _look_alike(value) if str in kinds and isinstance(value, str) else ""


def _look_alike(text: str) -> str:
    """The name of the first character that is not ASCII: it may look like one that is."""
    for character in text:
        if not character.isascii():
            name = unicodedata.name(character, "").lower() or "a character without a name"
            return f"; it has U+{ord(character):04X}, {name}"
    return ""


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*[-+]?[0-9]{1,50}(\.[0-9]{0,50})?\s*", text) is not None


def path_of(location: Location) -> str:
    """`tasks[1].name` for ("tasks", 1, "name")."""
    path = ""
    for part in location[:20]:
        path += f"[{part}]" if isinstance(part, int) else f".{shortened_name(part)}"
    return path.lstrip(".") or "the file"


def shortened_name(name: object) -> str:
    """The name of a field, which somebody may have made very long or not printable."""
    text = str(name)
    return text if 0 < len(text) <= 60 and text.isprintable() else shortened(text)
