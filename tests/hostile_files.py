"""Strategies that change files as a broken disk, another program or somebody with bad intent might:
their bytes, the structure of their JSON, and the header of a safetensors file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hypothesis import strategies as st

from raytvb.storage.sealed_json import sealed

Draw = Callable[[st.SearchStrategy[Any]], Any]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 7, 2**31, 2**62, 2**63, 2**64, 10**30, -(2**63)),
    *(0.5, -0.0, 3.0, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "1", "nan", ".", "..", "../x", "../../../../etc/passwd", "/etc/passwd", "a//b", "a\\b"),
    *("record.json", "a\x00b", "é\ud800", "x" * 3000, "{}", "F64", "BOOL", "sparse"),
    *([], {}, [[]], {"a": 1}, [{"name": []}], [{"name": "a"}], {"name": {}}, [1] * 70, [0, 2**62]),
    *([2**40, 2**40], [-1, 4], [4, 0], [True, 4], [1.0, 4], nested(40), nested(240), nested(400)),
)
"""Values that do not belong where they are put."""

TEXTS: tuple[bytes, ...] = (
    *(b"", b"\x00", b"{}", b"[]", b"null", b"5", b'"text"', b"NaN", b"\xff\xfe{", b"{" * 40),
    *(b"[" * 100_000, b'{"a":' * 100_000, b'{"format": 99}', b'{"format": true}'),
    b"[" + b"9" * 5000 + b"]",
)
"""Whole files that are none."""

YAMLS: tuple[bytes, ...] = (
    *(
        b"!!int ''",
        b"!!bool maybe",
        b"!!timestamp x",
        b"!!float x",
        b"2020-13-45",
        b"a: 2020-01-01",
    ),
    *(b"!!python/object/apply:os.getcwd []", b"!x 1", b"? [a]\n: 1", b"? {a: 1}\n: 1", b"1: 2"),
    *(b"&a [*a]", b"&a {b: *a}", b"x: *unknown", b"a: .nan", b"!!set {a, b}", b"!!binary abc"),
    *(b"a: &b {<<: *b}", b"{<<: [1]}", b"[" * 3000, b"a: !!binary YQ==", b"--- 1\n--- 2", b"\xff"),
    b"l0: &l0 [x, x]\n"
    + b"".join(b"l%d: &l%d [*l%d, *l%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 60)),
    b"tasks: &a [&b {name: *a}, *b]\nseed: *a",
)
"""YAML that is no experiment: tags, numbers that are none, aliases of themselves or of billions."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON document."""
    found = [path]
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = [*value.items()]
    elif isinstance(value, list):
        items = [*enumerate(value)]
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@st.composite
def altered_json(draw: Draw, document: Any) -> Any:
    """The document with one to three values replaced, removed, doubled or moved."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(document)))
        if not path:
            document = copy.deepcopy(draw(st.sampled_from((document, document, *ODD))))
            continue
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(("odd", "odd", "odd", "remove", "double", "move"))):
            case "odd":
                parent[path[-1]] = copy.deepcopy(draw(st.sampled_from(ODD)))
            case "remove":
                del parent[path[-1]]
            case "double" if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[path[-1]]))
            case "double":
                parent[draw(st.sampled_from(("", "x", "../x", "a\x00", "~")))] = parent[path[-1]]
            case _:
                other = draw(st.sampled_from(places(document)))
                moved = document
                for key in other:
                    moved = moved[key]
                parent[path[-1]] = copy.deepcopy(moved)
    return document


@st.composite
def altered_bytes(draw: Draw, data: bytes) -> bytes:
    """The bytes with a bit flipped, a piece cut out, doubled or overwritten; or other bytes."""
    at = draw(st.integers(0, max(0, len(data) - 1)))
    length = draw(st.sampled_from((1, 2, 8, 100)))
    match draw(st.sampled_from(("flip", "flip", "cut", "end", "double", "noise", "text"))):
        case "flip":
            bit = 1 << draw(st.integers(0, 7))
            return data[:at] + bytes(byte ^ bit for byte in data[at : at + 1]) + data[at + 1 :]
        case "cut":
            return data[:at] + data[at + length :]
        case "end":
            return data[:at]
        case "double":
            return data[:at] + data[at : at + length] + data[at:]
        case "noise":
            noise = bytes(draw(st.binary(min_size=1, max_size=16)))
            return data[:at] + noise + data[at + length :]
        case _:
            return bytes(draw(st.sampled_from(TEXTS)))


def as_record(document: Any, is_sealed: bool) -> bytes:
    """The file of a record, with its own checksum if it can have one."""
    if is_sealed and isinstance(document, dict):
        fields = {key: document[key] for key in document if key not in ("format", "sha256")}
        with suppress(ValueError, RecursionError):
            return sealed(fields)
    return json.dumps(document).encode()


@st.composite
def altered_record(draw: Draw, data: bytes) -> bytes:
    """A record with other contents and a right checksum, or with other bytes."""
    if draw(st.integers(0, 4)) == 0:
        return bytes(draw(altered_bytes(data)))
    return as_record(draw(altered_json(json.loads(data))), draw(st.booleans()))


@st.composite
def altered_plain_json(draw: Draw, data: bytes) -> bytes:
    """A file of JSON with other contents, or with other bytes."""
    if draw(st.integers(0, 4)) == 0:
        return bytes(draw(altered_bytes(data)))
    return json.dumps(draw(altered_json(json.loads(data)))).encode()


@st.composite
def altered_tensor_file(draw: Draw, data: bytes) -> bytes:
    """A safetensors file whose header, or the metadata in it, or the length of it, lies."""
    start = 8 + int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:start]), data[start:]
    kind = draw(st.sampled_from(("header", "header", "metadata", "metadata", "length", "bytes")))
    if kind == "bytes":
        return bytes(draw(altered_bytes(data)))
    if kind == "length":
        length = draw(st.sampled_from((0, 1, 2, start, len(data), 2**31, 2**63, 2**64 - 1)))
        return int(length).to_bytes(8, "little") + data[8:]
    if kind == "metadata" and "__metadata__" in header:
        ours = draw(altered_json(json.loads(header["__metadata__"]["raytvb"])))
        header["__metadata__"]["raytvb"] = json.dumps(ours)
    else:
        header = draw(altered_json(header))
    text = json.dumps(header).encode()
    if draw(st.integers(0, 9)) == 0:  # a name twice, which JSON allows
        text = text[:-1] + b"," + text[1:] if len(text) > 2 else text
    return len(text).to_bytes(8, "little") + text + body


@st.composite
def altered_yaml(draw: Draw, data: bytes) -> bytes:
    """A YAML document with a field that is replaced by something odd, or other bytes."""
    match draw(st.sampled_from(("bytes", "document", "field"))):
        case "bytes":
            return bytes(draw(altered_bytes(data)))
        case "document":
            return bytes(draw(st.sampled_from(YAMLS)))
        case _:
            lines = data.split(b"\n")
            at = draw(st.integers(0, len(lines) - 1))
            lines[at] = lines[at].partition(b":")[0] + b": " + draw(st.sampled_from(YAMLS))
            return b"\n".join(lines)


def altered(key: str, data: bytes) -> st.SearchStrategy[bytes]:
    """Changes that suit the kind of a store's file."""
    if key.endswith("record.json") or key == "gram/owner.json":
        return altered_record(data)
    if key.endswith(".json"):
        return altered_plain_json(data)
    if key.endswith(".yaml"):
        return altered_yaml(data)
    return altered_tensor_file(data) if key.endswith(".safetensors") else altered_bytes(data)
