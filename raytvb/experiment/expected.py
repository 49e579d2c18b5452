"""What a field of an experiment file takes, in words, from the field's own annotation."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raytvb.experiment.config import Experiment
from raytvb.experiment.fields import Words

Location = Sequence[int | str]
"""Where a field is: names of fields and positions in lists, from the top of the file."""

_PLAIN = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}

_FEW_FIELDS = 4


def field_at(location: Location) -> tuple[Location, Any]:
    """The part of an error's location that is a field, and the annotation of that field.

    pydantic appends the members of unions to the locations of its errors; these are left out.
    """
    annotation: Any = Experiment
    for depth, part in enumerate(location):
        inner = _inner(annotation, part)
        if inner is None:
            return location[:depth], annotation
        annotation = inner
    return location, annotation


def model_at(location: Location) -> type[BaseModel]:
    """The section at a location, which a field that is unknown there belongs to."""
    for kind in kinds_of(field_at(location)[1]):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return Experiment


def _inner(annotation: Any, part: int | str) -> Any:
    """The annotation of a field of a section, or of a member of a list; None if there is none."""
    for kind in kinds_of(annotation):
        if isinstance(part, int) and get_origin(kind) is tuple:
            members = get_args(kind)
            return members[min(part, len(members) - 1) if members[-1] is not ... else 0]
        if isinstance(part, str) and isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(part)
            return None if field is None else _annotated(field)
    return None


def _annotated(field: FieldInfo) -> Any:
    """The annotation of a field, with the bounds that pydantic has taken out of it."""
    annotation: Any = field.annotation
    for metadata in field.metadata:
        annotation = Annotated[annotation, metadata]
    return annotation


def kinds_of(annotation: Any) -> Iterator[Any]:
    """The types of an annotation: one, or the members of a union, without their bounds."""
    if get_origin(annotation) is Annotated:
        yield from kinds_of(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from kinds_of(member)
    else:
        yield annotation


def expected(annotation: Any, bounds: Sequence[Any] = ()) -> str:
    """What values an annotation allows: `a whole number, from 1 to 100`."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return expected(inner, [*bounds, *_flat(metadata)])
    for bound in bounds:
        if isinstance(bound, Words):
            return bound.text
    if get_origin(annotation) in (Union, types.UnionType):
        return ", or ".join(expected(member, bounds) for member in get_args(annotation))
    if get_origin(annotation) is Literal:
        return _either([repr(value) for value in get_args(annotation)])
    if get_origin(annotation) is tuple:
        return _list(get_args(annotation), bounds)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _section(annotation)
    if annotation is str:
        return f"text{_lengths(bounds, 'character')}"
    if annotation in (int, float):
        return f"{_PLAIN[annotation]}{_range(bounds)}"
    return _PLAIN.get(annotation, "another value")


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    """Bounds, with those that a `Field(…)` inside of an annotation holds."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _list(members: Sequence[Any], bounds: Sequence[Any]) -> str:
    if members[-1] is not ...:
        return f"a list of {len(members)} items, each {expected(members[0])}"
    return f"a list{_lengths(bounds, 'item')}, each {expected(members[0])}"


def _section(model: type[BaseModel]) -> str:
    names = [f"`{name}:`" for name in model.model_fields]
    more = ", …" if len(names) > _FEW_FIELDS else ""
    return f"fields ({', '.join(names[:_FEW_FIELDS])}{more})"


def _bound(bounds: Sequence[Any], name: str) -> Any:
    """The value of a bound; None if there is none. The last one counts, as it is a field's own."""
    values = [getattr(bound, name) for bound in bounds if getattr(bound, name, None) is not None]
    return values[-1] if values else None


def _lengths(bounds: Sequence[Any], unit: str) -> str:
    least, most = _bound(bounds, "min_length"), _bound(bounds, "max_length")
    words = []
    if least is not None:
        words.append(f"at least {least:,} {unit}{'s' * (least != 1)}")
    if most is not None:
        words.append(f"at most {most:,} {unit}s")
    return f" with {' and '.join(words)}" if words else ""


def _range(bounds: Sequence[Any]) -> str:
    """The range of a number: ` above 0 and at most 1`."""
    words = []
    for name, text in (("gt", "above"), ("ge", "from"), ("lt", "below"), ("le", "at most")):
        value = _bound(bounds, name)
        if value is not None:
            words.append(f"{text} {number(value)}")
    if len(words) == 2 and words[0].startswith("from") and words[1].startswith("at most"):
        return f" {words[0]} to {words[1].removeprefix('at most ')}"
    return f" {' and '.join(words)}".replace(" from ", " at least ") if words else ""


def number(value: float) -> str:
    """A bound as people write it: `1,000,000`, `0.5`, `1e+30`."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:g}"
