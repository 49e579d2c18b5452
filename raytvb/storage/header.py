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
from raytvb.storage.checked_file import CheckedFile
from raytvb.storage.contract import Contract, JsonObject, problem_of
from raytvb.storage.damage import DamagedError
from raytvb.storage.format_version import format_problem
from raytvb.storage.shapes import checked_shape

Metadata = TypeVar("Metadata", bound=Contract)

_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
"""What Python raises while it takes apart a header that somebody else may have written."""

_LONGEST = 100_000_000
"""Number of bytes that a header may have, as in the safetensors library. A file may claim more."""

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

    file: CheckedFile
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
    def read(cls, file: CheckedFile) -> Header:
        """Read the header in two requests (three for a header of more than 64 KiB).

        The header's bytes are not compared with the file's record; `check` does that. Raises
        VectorError for a file that is not whole, has no `raytvb` metadata, or was written by a
        newer raytvb, and StoreKeyError for a key that is missing.
        """
        size = file.size
        first = file.peek(0, min(size, _FIRST_READ))
        try:
            stop = _header_end(first, size)
            text = first[:stop]
            if stop > len(first):
                text += file.peek(len(first), stop)
            fields = json.loads(text[8:])
            info = _our_metadata(fields)
        except _MALFORMED as error:
            raise _not_whole(file, error) from None
        # Checked first, since a newer raytvb may write the rest of the header differently.
        problem = format_problem(info, file.where)
        if problem is not None:
            raise VectorError(problem.reason, problem.remedy)
        try:
            entries = _entries(fields)
            _check_size(entries, stop, size)
        except _MALFORMED as error:
            raise _not_whole(file, error) from None
        return cls(file, entries, info, stop, size, first)

    def info_as(self, contract: type[Metadata], what: str) -> Metadata:
        """Our metadata as a contract; `what` is the kind of file that has such metadata.

        Raises VectorError that says which fields are missing or wrong.
        """
        try:
            return contract.model_validate(self.info)
        except ValidationError as error:
            missing = [str(e["loc"][0]) for e in error.errors() if e["type"] == "missing"]
            problem = f" has no {', '.join(missing)}" if missing else f": {problem_of(error)}"
            raise VectorError(f"{self.file.where} is not a {what}: its metadata{problem}") from None

    def tensor_bytes(self, name: str) -> bytes:
        """The bytes of one tensor's values. Values close behind the header need no request.

        Raises KeyError if there is no such tensor.
        """
        entry = self.entries[name]
        begin, end = self.start + entry.begin, self.start + entry.end
        if end <= len(self.first):
            return self.first[begin:end]
        return self.file.peek(begin, end)

    def check(self, *names: str) -> None:
        """Compare the header, and the values of these tensors, with the file's record.

        Raises DamagedError if they differ.
        """
        self.file.check(0, self.start)
        for name in names:
            entry = self.entries[name]
            self.file.check(self.start + entry.begin, self.start + entry.end)


def _not_whole(file: CheckedFile, error: Exception) -> VectorError:
    """The error for a header that cannot be parsed."""
    if isinstance(error, DamagedError):
        return error
    reason = str(error) or type(error).__name__
    return VectorError(
        f"{file.where} is not a whole raytvb safetensors file: {reason}",
        "copy it again, or delete its folder and run again to make it anew",
    )


def _header_end(first: bytes, size: int) -> int:
    """Where the header ends, from the first bytes of a file of `size` bytes."""
    if size < 8:
        raise ValueError(f"it has {size} bytes")
    length = int(struct.unpack("<Q", first[:8])[0])
    if not 2 <= length <= min(size - 8, _LONGEST):
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
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
                begin, end = _whole_numbers([begin, end], "a place")
                sizes = checked_shape(_whole_numbers(shape, "a shape"))
                entries.append((name, TensorEntry(dtype, sizes, begin, end)))
            case _:
                raise ValueError("its header lacks dtype, shape or place of a tensor")
    entries.sort(key=lambda item: (item[1].begin, item[1].end))
    return dict(entries)


def _whole_numbers(values: Sequence[object], what: str) -> tuple[int, ...]:
    numbers = []
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"its header has {value!r:.80} in {what}")
        numbers.append(value)
    return tuple(numbers)


def _check_size(entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """Raise ValueError unless the tensors follow each other, and end where the file ends."""
    end = start
    for name, entry in entries.items():
        if start + entry.begin != end or entry.end < entry.begin:
            raise ValueError(f"its header lets tensors overlap, or leaves a gap before {name:.80}")
        end = start + entry.end
    if end != size:
        raise ValueError(f"it has {size} bytes, its header describes {end}")
