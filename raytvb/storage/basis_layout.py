"""Bases on disk: S = V B in pieces of at most 32 MB, so that no process holds a whole basis.

A basis is a folder of safetensors files with an index. Each file holds a range of the coordinates
of all basis vectors. The index has the form that the Hugging Face hub uses (`weight_map`: tensor to
file). A tensor is named after its parameter and stacks the M basis vectors: (M, *shape), or
(M, kept) where the vectors share a mask. If a file ends inside a tensor, the tensor is cut, and its
parts are named `parameter[start:stop]` by flat positions. Values are float32.

The first writing of a basis has the names `basis-00001-of-00003.safetensors` and
`basis.safetensors.index.json`. A basis that is written again has a tag in its names, as in
`basis-1f2e3d4c-00001-of-00003.safetensors`. The record of the basis lists its files, among them the
index, and the index lists the pieces.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from pydantic import Field

from raytvb.maths.gram_blocks import BLOCK
from raytvb.storage.contract import Contract
from raytvb.storage.shapes import Shape, Size
from raytvb.storage.vectors import VectorInfo, vector_info

INDEX_ENDING = ".safetensors.index.json"
"""How the name of the index of a basis ends."""

INDEX = f"basis{INDEX_ENDING}"

SEGMENT = 16 * BLOCK
"""Number of coordinates in a segment. No file crosses a multiple of it, so that several writers can
share a basis.
"""

_FILE_BYTES = 32 * 2**20


class BasisMetadata(Contract):
    """Metadata of the index of a basis."""

    total_size: int
    """Bytes of all values."""
    size: Size = Field(ge=1)
    """Number of basis vectors M."""
    shapes: dict[str, Shape]
    """Shapes of what is stored for one vector, as `Layout.shapes`."""
    parameters: dict[str, Shape]
    """Shapes of the parameters, as `Layout.parameters`."""
    raytvb: VectorInfo
    """The metadata that the header of a vector file in the folder of the basis would have."""


@dataclass(frozen=True)
class Layout:
    """The coordinates of basis vectors, which are those of the task vectors they are made of."""

    base: str
    """Fingerprint of the pretrained model."""
    parameters: Mapping[str, tuple[int, ...]]
    """Shapes of the parameters, names sorted."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the stored tensors: those of the parameters, or (kept,) where there is a mask."""
    mask_key: str | None = None
    """Key of the shared mask in the store."""
    mask: str | None = None
    """Fingerprint of the shared mask."""

    @property
    def count(self) -> int:
        """Number of coordinates."""
        return sum(map(prod, self.shapes.values()))

    def info(self, prefix: str) -> VectorInfo:
        """Metadata of vector files in the folder `prefix`."""
        path = None if self.mask_key is None else posixpath.relpath(self.mask_key, prefix)
        return vector_info(self.base, mask_path=path, mask=self.mask)


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that one file holds."""

    tensor: str
    """Name of the tensor in the file."""
    count: int
    """Number of coordinates."""
    shape: tuple[int, ...]
    """Shape of the part for one vector."""


def file_columns(size: int) -> int:
    """Coordinates in each file of a basis of `size` vectors.

    The number is a power of two that divides SEGMENT, and at least 4,096. A file has at most 32 MB,
    unless 4,096 coordinates take more.
    """
    fitting = max(1, _FILE_BYTES // (4 * size))
    power_of_two = 1 << (fitting.bit_length() - 1)
    return min(SEGMENT, max(4096, power_of_two))


def file_names(size: int, count: int, tag: str = "") -> list[str]:
    """The files of a basis of `size` vectors of `count` coordinates.

    tag: of a basis that was written again (see `replacing`); '' for one that was written once.
    """
    total = max(1, -(-count // file_columns(size)))
    stem = f"basis-{tag}" if tag else "basis"
    return [f"{stem}-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]


def tag_of(names: Iterable[str]) -> str:
    """The tag in the names of the files of a basis, which its index tells; '' if it has none."""
    for name in names:
        if name.endswith(INDEX_ENDING):
            return name.removesuffix(INDEX_ENDING).removeprefix("basis").removeprefix("-")
    return ""


def pieces_of(shapes: Mapping[str, tuple[int, ...]], start: int, stop: int) -> Iterator[Piece]:
    """The pieces that lie in coordinates start..stop, in their order.

    shapes: as `Layout.shapes`.
    """
    first = 0
    for name, shape in shapes.items():
        last = first + prod(shape)
        low, high = max(first, start), min(last, stop)
        if (low, high) == (first, last) and low < high:
            yield Piece(name, high - low, shape)
        elif low < high:
            yield Piece(f"{name}[{low - first}:{high - first}]", high - low, (high - low,))
        first = last


def index_bytes(layout: Layout, size: int, prefix: str, tag: str = "") -> bytes:
    """The index file of a basis of `size` vectors: which file has which tensor, and the layout.

    tag: as in `file_names`.
    """
    columns = file_columns(size)
    weight_map: dict[str, str] = {}
    for number, name in enumerate(file_names(size, layout.count, tag)):
        start = number * columns
        stop = min(start + columns, layout.count)
        for piece in pieces_of(layout.shapes, start, stop):
            weight_map[piece.tensor] = name
    metadata = BasisMetadata(
        total_size=4 * size * layout.count,
        size=size,
        shapes=dict(layout.shapes),
        parameters=dict(layout.parameters),
        raytvb=layout.info(prefix),
    )
    document = {"metadata": metadata.to_json(), "weight_map": weight_map}
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
