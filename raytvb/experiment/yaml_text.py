"""YAML that somebody else may have written: plain data are read, and all else is refused by line.

A document goes through two passes before any value is made. The first reads the events of the
parser one by one, so the number of values and their nesting are bounded before memory is taken. The
second walks the graph of nodes and counts what its aliases stand for: a hundred bytes of them can
stand for billions of values.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

from raytvb.errors import shortened

MOST_BYTES = 16 * 2**20
"""Size of a document, far beyond any real one: 10,000 tasks take about one MB."""

MOST_VALUES = 1_000_000
"""Number of values in a document, each counted as often as aliases repeat it."""

MOST_ITEMS = 100_000
"""Number of items in a list; half of that of fields in a section."""

DEEPEST = 100
"""Levels of lists and fields inside of each other."""

LONGEST_NUMBER = 400
"""Characters of a number. The largest floating-point number has 309 digits."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

_PREFIX = "tag:yaml.org,2002:"
_SCALARS = {_PREFIX + name for name in ("str", "int", "float", "bool", "null")}
_TEXT = _PREFIX + "str"
_MERGE = _PREFIX + "merge"
_OCTAL = re.compile(r"[-+]?0[0-7_]+")

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


class YamlTextError(ValueError):
    """Text that is not YAML, or whose values no experiment can have. Says in which line."""


@dataclass(frozen=True)
class Document:
    """The values of a YAML document, and how they are written."""

    values: Any
    root: Any = None
    """The node of the whole document; None for an empty one."""

    def written(self, field: Sequence[str | int]) -> str | None:
        """The text of a field that YAML takes for something else than text: `no`, `1e3`.

        field: names of fields and positions in lists, from the top. None if it is text, or if there
        is no single value at this place.
        """
        node = self.root
        for part in field:
            node = _member(node, part)
        is_other = isinstance(node, yaml.ScalarNode) and node.tag != _TEXT
        return str(node.value) if is_other else None


def _member(node: Any, part: str | int) -> Any:
    """The node of an item of a list, or of a field; None if there is none."""
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part]
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == part:
                return value
    return None


def parse_yaml(text: str | bytes) -> Any:
    """The values in a YAML document. Raises YamlTextError as `parse_document`."""
    return parse_document(text).values


def parse_document(text: str | bytes) -> Document:
    """The values in a YAML document, and the nodes that they are made from.

    Raises YamlTextError if it is not YAML in UTF-8, and for what no experiment needs: several
    documents, a field given twice, fields whose names are not text, dates, tags of other types,
    numbers that YAML 1.1 reads in base 8 or 60, more than a million values, also if it is aliases
    that multiply them.
    """
    decoded = _checked(text)
    try:
        _check_events(yaml.parse(decoded, Loader=_Loader))
        with _without_collector():
            return _constructed(decoded)
    except yaml.MarkedYAMLError as error:
        raise YamlTextError(_syntax(error, decoded)) from None
    except yaml.YAMLError as error:
        raise YamlTextError(f"it cannot be read ({shortened(str(error), 100)})") from None


@contextmanager
def _without_collector() -> Iterator[None]:
    """Run the block without Python's collector of circular garbage.

    It would look at all nodes again and again while they are made, which takes twice their time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _constructed(text: str) -> Document:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return Document(None)
        _Walk(loader).size(root)
        return Document(loader.construct_document(root), root)
    finally:
        loader.dispose()


def dump_yaml(values: object) -> str:
    """Plain values as YAML, with their fields in the order in which they are."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


# The text -----------------------------------------------------------------------------------------

_NOT_TEXT = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What YAML allows nowhere."""


def _checked(text: str | bytes) -> str:
    """The text of a document. Raises YamlTextError if it is no text, or too long."""
    if len(text) > MOST_BYTES:
        raise YamlTextError(f"it is larger than {MOST_BYTES // 2**20} MB: is it the right file?")
    decoded = text if isinstance(text, str) else _decoded(text)
    decoded = decoded.removeprefix("\ufeff")  # a byte order mark
    odd = _NOT_TEXT.search(decoded)
    if odd:
        line = decoded.count("\n", 0, odd.start()) + 1
        raise YamlTextError(
            f"line {line}: the control character U+{ord(odd[0]):04X} is not allowed: remove it, or "
            f"save the file as text in UTF-8"
        )
    return decoded


def _decoded(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise YamlTextError("it is written in UTF-16: save it as UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise YamlTextError(
            f"line {line}: byte 0x{data[error.start]:02x} is not UTF-8: save it as UTF-8"
        ) from None


def _syntax(error: yaml.MarkedYAMLError, text: str) -> str:
    """Where the text is no YAML, and what may be the cause."""
    mark = error.problem_mark or error.context_mark
    problem = str(error.problem or error.context or error)[:100]
    if mark is None:
        return f"its structure is broken ({problem}): check indentation, brackets and quotes"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    indentation = line[: len(line) - len(line.lstrip())]
    where = f"line {mark.line + 1}"
    if "\t" in indentation or line[mark.column : mark.column + 1] == "\t":
        return f"{where} is indented with a tab: use spaces"
    if "undefined alias" in problem:
        name = re.match(r"\*[^\s,\]}]*", line[mark.column :])
        return (
            f"{where}: no anchor defines the alias {shortened(name[0] if name else '*')}: put "
            f"the text in quotes if it is meant as text"
        )
    if "nesting depth" in problem:
        return f"{where}: {_TOO_DEEP}"
    return (
        f"{where}, column {mark.column + 1}: the structure breaks here or just above ({problem}): "
        f"check indentation, brackets and quotes; text with one of {{ }} [ ] : # & * ! % @ ` must "
        f"be in quotes"
    )


_TOO_DEEP = f"lists and fields are nested deeper than {DEEPEST} levels: no field needs this"
_TOO_MANY = f"more than {MOST_VALUES:,} values: no experiment needs so many"


def _check_events(events: Iterable[Any]) -> None:
    """Raise YamlTextError for a second document, and for too many or too deeply nested values."""
    documents = values = 0
    items = [0]  # of each list around the event; the name and the value of a field are two
    for event in events:
        if isinstance(event, yaml.NodeEvent):
            values += 1
            items[-1] += 1
            if values > MOST_VALUES:
                raise YamlTextError(f"line {_line(event)}: {_TOO_MANY}")
            if items[-1] > MOST_ITEMS:
                raise YamlTextError(
                    f"line {_line(event)}: more than {MOST_ITEMS:,} items in one list, or half as "
                    f"many fields in one section: no experiment needs so many"
                )
        if isinstance(event, yaml.CollectionStartEvent):
            items.append(0)
            if len(items) > DEEPEST + 1:
                raise YamlTextError(f"line {_line(event)}: {_TOO_DEEP}")
        elif isinstance(event, yaml.CollectionEndEvent):
            items.pop()
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise YamlTextError(
                    f"line {_line(event)}: a second document begins here (---): put every "
                    f"experiment in a file of its own"
                )


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


# The nodes ----------------------------------------------------------------------------------------


class _Walk:
    """Measures a document, and checks each of its nodes once, however many aliases it has."""

    def __init__(self, loader: Any) -> None:
        """loader: makes the values of numbers and the like, and keeps them."""
        self._loader = loader
        self._sizes: dict[int, tuple[int, int]] = {}
        self._open: set[int] = set()

    def size(self, node: Any) -> tuple[int, int]:
        """How many values a node stands for, and how many levels of lists and fields."""
        if isinstance(node, yaml.ScalarNode):
            if node.tag != _TEXT:
                self._check_scalar(node)
            return 1, 0
        if id(node) in self._open:
            raise YamlTextError(f"line {_line(node)}: this value contains itself, by an alias")
        if id(node) not in self._sizes:
            _check_collection(node)
            self._open.add(id(node))
            self._sizes[id(node)] = self._size_of_collection(node)
            self._open.discard(id(node))
        return self._sizes[id(node)]

    def _size_of_collection(self, node: Any) -> tuple[int, int]:
        values, levels = 1, 0
        for inner in _inner(node):
            inner_values, inner_levels = self.size(inner)
            values += inner_values
            levels = max(levels, inner_levels)
        if values > MOST_VALUES:
            raise YamlTextError(f"line {_line(node)}: aliases multiply this to {_TOO_MANY}")
        if levels >= DEEPEST:
            raise YamlTextError(f"line {_line(node)}: {_TOO_DEEP}")
        return values, levels + 1

    def _check_scalar(self, node: Any) -> None:
        """Raise YamlTextError for what is no plain value, or has another meaning than it seems."""
        if node.tag not in _SCALARS:
            raise YamlTextError(_foreign(node))
        if node.tag in (_PREFIX + "int", _PREFIX + "float"):
            _check_number(node)
        try:
            self._loader.construct_object(node)
        except _MALFORMED:
            kind = node.tag.removeprefix(_PREFIX)
            raise YamlTextError(
                f"line {_line(node)}: {shortened(node.value)} is no value of the type {kind}, as "
                f"it seems to be: correct it, or put it in quotes if it is meant as text"
            ) from None


def _inner(node: Any) -> Iterator[Any]:
    """The items of a list, or the values of fields."""
    if isinstance(node, yaml.SequenceNode):
        return iter(node.value)
    return (value for _, value in node.value)


def _check_collection(node: Any) -> None:
    """Raise YamlTextError unless it is a plain list, or has fields with names that differ."""
    is_list = isinstance(node, yaml.SequenceNode)
    if node.tag != _PREFIX + ("seq" if is_list else "map"):
        raise YamlTextError(_foreign(node))
    if is_list:
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        _check_name(key, value)
        if key.value in lines:
            raise YamlTextError(
                f"line {_line(key)}: {shortened(key.value)} is given for the second time, after "
                f"line {lines[key.value]}: leave one out"
            )
        lines[key.value] = _line(key)


def _check_name(key: Any, value: Any) -> None:
    """Raise YamlTextError unless the name of a field is text."""
    if not isinstance(key, yaml.ScalarNode):
        raise YamlTextError(
            f"line {_line(key)}: the name of a field is a list or has fields: use text"
        )
    if key.tag == _MERGE:
        sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(source, yaml.MappingNode) for source in sources):
            raise YamlTextError(
                f"line {_line(key)}: `<<` takes the alias of something with fields, as in "
                f"`<<: *common`"
            )
    elif key.tag != _TEXT:
        raise YamlTextError(
            f"line {_line(key)}: the name of a field, {shortened(key.value)}, is {_meaning(key)} "
            f"in YAML: put it in quotes if it is meant as text"
        )


def _check_number(node: Any) -> None:
    """Raise YamlTextError for numbers that do not mean what most people would read."""
    text = node.value
    if len(text) > LONGEST_NUMBER:
        raise YamlTextError(
            f"line {_line(node)}: a number of {len(text):,} characters, {shortened(text)}: no "
            f"field takes such a number"
        )
    if ":" in text:
        raise YamlTextError(
            f"line {_line(node)}: YAML reads {text} as a number in base 60: put it in quotes if it "
            f"is meant as text"
        )
    if node.tag == _PREFIX + "int" and _OCTAL.fullmatch(text):
        raise YamlTextError(
            f"line {_line(node)}: YAML reads {text} as a number in base 8: leave the leading zero "
            f"out, or put it in quotes if it is meant as text"
        )


_MEANINGS = {
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
    "null": "no value",
    "timestamp": "a date",
    "value": "a default",
    "merge": "the sign that merges fields",
}


def _meaning(node: Any) -> str:
    return _MEANINGS.get(node.tag.removeprefix(_PREFIX), f"of the type {shortened(node.tag)}")


def _foreign(node: Any) -> str:
    """Why a node that is no plain data is refused."""
    kind = node.tag.removeprefix(_PREFIX)
    if kind in _MEANINGS and isinstance(node, yaml.ScalarNode):
        return (
            f"line {_line(node)}: {shortened(node.value)} is {_meaning(node)} in YAML: put it in "
            f"quotes if it is meant as text"
        )
    return (
        f"line {_line(node)}: the tag {shortened(kind)}: use plain text, numbers, lists and fields "
        f"(text that begins with ! must be in quotes)"
    )
