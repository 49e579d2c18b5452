"""The header that all our safetensors files share.

A safetensors file is 8 bytes with the length of its header, the header as JSON, and the values of
all tensors one after the other. Our files have one metadata key, `raytvb`, which holds JSON again.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import ValidationError

from raytvb.errors import VectorError
from raytvb.storage.contract import Contract, JsonObject, problem_of
from raytvb.storage.format_version import format_problem
from raytvb.storage.store import Store

Metadata = TypeVar("Metadata", bound=Contract)

_FIRST_READ = 2**16
"""Number of bytes in the first request. The headers of most models fit, which saves a request."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies; `begin` and `end` count bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of one file of a store."""

    store: Store
    key: str
    entries: Mapping[str, TensorEntry]
    """The tensors by name, in the order in which they lie in the file."""
    info: JsonObject
    """Our metadata."""
    start: int
    """Where the values begin: bytes from the start of the file."""
    size: int
    """Bytes of the file."""
    first: bytes
    """The first bytes of the file, as they were read."""

    @classmethod
    def read(cls, store: Store, key: str) -> Header:
        """Read the header in two requests (three for a header of more than 64 KiB).

        Raises VectorError for a file that is not whole, has no `raytvb` metadata, or was written by
        a newer raytvb, and StoreKeyError for a key that is missing.
        """
        size = store.size(key)
        first = store.read_range(key, 0, min(size, _FIRST_READ))
        try:
            stop = _header_end(first, size)
            text = first[:stop]
            if stop > len(first):
                text += store.read_range(key, len(first), stop)
            fields = json.loads(text[8:])
            info = _our_metadata(fields)
        except (ValueError, TypeError, AttributeError) as error:
            raise _not_whole(store, key, str(error)) from None
        # Checked first, since a newer raytvb may write the rest of the header differently.
        problem = format_problem(info, store.where(key))
        if problem is not None:
            raise VectorError(problem.reason, problem.remedy)
        try:
            entries = _entries(fields)
            _check_size(entries, stop, size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _not_whole(store, key, str(error)) from None
        return cls(store, key, entries, info, stop, size, first)

    def info_as(self, contract: type[Metadata], what: str) -> Metadata:
        """Our metadata as a contract; `what` is the kind of file that has such metadata.

        Raises VectorError that says which fields are missing or wrong.
        """
        try:
            return contract.model_validate(self.info)
        except ValidationError as error:
            missing = [str(e["loc"][0]) for e in error.errors() if e["type"] == "missing"]
            problem = f" has no {', '.join(missing)}" if missing else f": {problem_of(error)}"
            where = self.store.where(self.key)
            raise VectorError(f"{where} is not a {what}: its metadata{problem}") from None

    def tensor_bytes(self, name: str) -> bytes:
        """The bytes of one tensor's values. Values close behind the header need no request.

        Raises KeyError if there is no such tensor.
        """
        entry = self.entries[name]
        begin, end = self.start + entry.begin, self.start + entry.end
        if end <= len(self.first):
            return self.first[begin:end]
        return self.store.read_range(self.key, begin, end)


def _not_whole(store: Store, key: str, reason: str) -> VectorError:
    return VectorError(
        f"{store.where(key)} is not a whole raytvb safetensors file: {reason}",
        "copy it again, or delete its folder and run again to make it anew",
    )


def _header_end(first: bytes, size: int) -> int:
    """Where the header ends, from the first bytes of a file of `size` bytes."""
    if size < 8:
        raise ValueError(f"it has {size} bytes")
    length = int(struct.unpack("<Q", first[:8])[0])
    if not 2 <= length <= size - 8:
        raise ValueError(f"its header claims {length} bytes of a file of {size}")
    return 8 + length


def _our_metadata(fields: dict[str, dict[str, str]]) -> JsonObject:
    """The parsed `raytvb` metadata of a parsed header."""
    metadata = fields.get("__metadata__", {})
    if "raytvb" not in metadata:
        raise ValueError("it has no `raytvb` metadata; `raytvb.vector_bytes` writes it")
    return dict(json.loads(metadata["raytvb"]))


def _entries(fields: dict[str, JsonObject]) -> dict[str, TensorEntry]:
    """The tensors of a parsed header, in the order in which they lie in the file."""
    entries = []
    for name, entry in fields.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
                entries.append((name, TensorEntry(dtype, _whole_numbers(shape), begin, end)))
            case _:
                raise ValueError("its header lacks dtype, shape or place of a tensor")
    entries.sort(key=lambda item: item[1].begin)
    return dict(entries)


def _whole_numbers(shape: Sequence[object]) -> tuple[int, ...]:
    sizes = []
    for size in shape:
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"its header has {size!r} in a shape")
        sizes.append(size)
    return tuple(sizes)


def _check_size(entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """Raise ValueError unless the tensors end where the file ends."""
    end = start
    for entry in entries.values():
        end = max(end, start + entry.end)
    if end != size:
        raise ValueError(f"it has {size} bytes, its header describes {end}")
