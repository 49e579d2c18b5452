"""Bases on disk: S = V B written and read in pieces of at most 32 MB, so that no process holds a
whole basis.

A basis is a folder of safetensors files, each a range of the coordinates of all its vectors, and an
index as the Hugging Face hub has it (`weight_map`: tensor to file). A tensor is named after its
parameter and stacks the M basis
vectors: (M, *shape), or (M, kept) where the vectors share a mask. A tensor in which a file ends is
cut, and its parts are named `parameter[start:stop]` by flat positions. Values are float32.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from raytvb.maths.gram import BLOCK
from raytvb.storage.vectors import vector_info

INDEX = "basis.safetensors.index.json"


SEGMENT = (
    16 * BLOCK
)  # coordinates: files never cross a multiple of it, so that writers can share a basis


_FILE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Layout:
    """The coordinates that basis vectors have, those of the task vectors they are made of."""

    base: str
    """Fingerprint of the pretrained model."""
    parameters: Mapping[str, tuple[int, ...]]
    """Shapes of the parameters, names sorted."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of what is stored: those of the parameters, or (kept,) where there is a mask."""
    mask_key: str | None = None
    mask: str | None = None
    """Fingerprint of the shared mask."""

    @property
    def count(self) -> int:
        """Number of coordinates."""
        return sum(prod(s) for s in self.shapes.values())

    def info(self, prefix: str) -> dict[str, Any]:
        """Metadata of files in the folder `prefix`."""
        path = None if self.mask_key is None else posixpath.relpath(self.mask_key, prefix)
        return vector_info(self.base, mask_path=path, mask=self.mask)


def file_columns(size: int) -> int:
    """Coordinates in each file of a basis of `size` vectors: a power of two that divides SEGMENT,
    at most 32 MB.
    """
    return min(SEGMENT, max(4096, 1 << (max(1, _FILE_BYTES // (4 * size)).bit_length() - 1)))


def file_names(size: int, count: int) -> list[str]:
    """The files of a basis of `size` vectors of `count` coordinates."""
    total = max(1, -(-count // file_columns(size)))
    return [f"basis-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]


def pieces_of(
    shapes: Mapping[str, tuple[int, ...]], start: int, stop: int
) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """(tensor name, number of coordinates, shape) of what lies in coordinates start..stop, in their
    order.
    """
    first = 0
    for name, shape in shapes.items():
        last = first + prod(shape)
        low, high = max(first, start), min(last, stop)
        if low < high:
            whole = high - low == last - first
            yield (
                (name, high - low, shape)
                if whole
                else (f"{name}[{low - first}:{high - first}]", high - low, (high - low,))
            )
        first = last


def index_bytes(layout: Layout, size: int, prefix: str) -> bytes:
    """The index of a basis of `size` vectors: which file has which tensor, and what the coordinates
    are.
    """
    columns, where = file_columns(size), dict[str, str]()
    for number, name in enumerate(file_names(size, layout.count)):
        start = number * columns
        where |= {
            t: name
            for t, _, _ in pieces_of(layout.shapes, start, min(start + columns, layout.count))
        }
    shapes = {n: list(s) for n, s in layout.shapes.items()}
    document = {
        "metadata": {
            "total_size": 4 * size * layout.count,
            "size": size,
            "shapes": shapes,
            "parameters": {n: list(s) for n, s in layout.parameters.items()},
            "raytvb": layout.info(prefix),
        },
        "weight_map": where,
    }
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
