"""Vector files: one task vector on disk, and reading any range of it.

A vector file is a safetensors file of one dtype with tensors in the order of their sorted names, so
its data section is one flat array and a range of coordinates is a range of bytes. Its only metadata
key, `raytvb`, is JSON without times, URLs or machine names, so equal vectors are equal files. A
sparse vector has the kept values of each parameter as a 1-D tensor, and names its mask file by a
path relative to itself.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterable, Mapping
from math import prod
from typing import Literal

import torch
from pydantic import model_serializer
from safetensors.torch import save
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.maths.gram_blocks import BLOCK
from raytvb.storage.addresses import checked_key
from raytvb.storage.checked_file import CheckedFile
from raytvb.storage.contract import Contract, JsonObject
from raytvb.storage.format_version import FORMAT
from raytvb.storage.header import Header
from raytvb.storage.masks import MaskFile, OpenMasks
from raytvb.storage.records import FileInfo
from raytvb.storage.store import Store

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}

VECTOR = "vector.safetensors"
"""Name of a vector file in its folder. A vector that was made again has a tag in its name."""


def vector_file(files: Iterable[str]) -> str:
    """The name of the vector file among those that the record of a vector lists.

    VECTOR if there is none, which no record lists then.
    """
    stem, _, ending = VECTOR.partition(".")
    for name in files:
        if name.startswith(stem) and name.endswith(ending):
            return name
    return VECTOR


class VectorInfo(Contract):
    """Metadata of a vector file."""

    base: str
    """Fingerprint of the pretrained model that the vector is a difference from."""
    kind: Literal["dense", "sparse"] = "dense"
    mask: str | None = None
    """Path of the mask file relative to the vector file; None for a dense vector."""
    mask_fingerprint: str | None = None
    format: int = FORMAT

    @model_serializer
    def _fields(self) -> JsonObject:
        """The fields for JSON, without those of the mask if the vector is dense."""
        fields: JsonObject = {"base": self.base, "format": self.format, "kind": self.kind}
        if self.mask is None:
            return fields
        return {**fields, "mask": self.mask, "mask_fingerprint": self.mask_fingerprint}


def vector_info(base: str, *, mask_path: str | None = None, mask: str | None = None) -> VectorInfo:
    """Metadata of a vector file.

    base: fingerprint of the pretrained model. mask: fingerprint of the mask of a sparse vector.
    mask_path: path of the mask file relative to the vector file.
    """
    if mask is None:
        return VectorInfo(base=base)
    return VectorInfo(base=base, kind="sparse", mask=mask_path, mask_fingerprint=mask)


def vector_bytes(values: Mapping[str, Tensor], info: VectorInfo) -> bytes:
    """A vector file of the given tensors by parameter: dense ones, or the 1-D kept values.

    Raises ValueError unless all tensors have one dtype, float32 or bfloat16.
    """
    dtypes = {t.dtype for t in values.values()}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        raise ValueError(
            f"a vector file has one dtype, float32 or bfloat16, not {', '.join(map(str, dtypes))}"
        )
    tensors = {n: t.detach().cpu().contiguous() for n, t in values.items()}
    return save(tensors, metadata={"raytvb": json.dumps(info.to_json(), sort_keys=True)})


def mask_key_of(store: Store, key: str) -> str | None:
    """Key of a vector file's mask file; None if the vector is dense. Raises as `VectorFile`."""
    info = Header.read(CheckedFile(store, key, None)).info_as(VectorInfo, "vector file")
    return _mask_key(store, key, info) if info.kind == "sparse" else None


def _mask_key(store: Store, key: str, info: VectorInfo) -> str:
    where = store.where(key)
    if info.mask is None or info.mask_fingerprint is None:
        missing = "mask" if info.mask is None else "mask_fingerprint"
        raise VectorError(f"{where} is not a vector file: its metadata has no {missing}")
    return mask_key_below(store, posixpath.dirname(key), info.mask, where)


def mask_key_below(store: Store, folder: str, path: str, where: str) -> str:
    """The key of the mask that a file in `folder` names by a relative path.

    where: the file, for the message. Raises VectorError for a path that leads out of the store, or
    that is no path of a file.
    """
    try:
        return checked_key(posixpath.normpath(posixpath.join(folder, path)))
    except ValueError:
        raise VectorError(f"{where}: its mask {path:.200} lies outside of {store.url}") from None


class VectorFile:
    """One vector in a store, read by ranges. Opening it reads only its header and its mask's.

    If the vector's folder has a record, the bytes of every value that is read are compared with it.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        masks: OpenMasks | None = None,
        info: FileInfo | None = None,
    ) -> None:
        """masks: the masks that other vectors have opened, so that a shared mask is read once.
        info: the version that is wanted, for a caller that has read the vector's record.

        Raises VectorError for a file that is truncated, of mixed dtype, not a vector file, or of a
        newer raytvb, and for a mask that does not match. Raises StoreKeyError for a missing file.
        """
        self.store, self.key = store, key
        file = CheckedFile.find(store, key) if info is None else CheckedFile(store, key, info)
        header = Header.read(file)
        self._header, self._file = header, file
        self.info = header.info_as(VectorInfo, "vector file")
        self.data_start, self.file_size = header.start, header.size
        self.dtype = self._one_dtype(header)
        self.shapes = {name: entry.shape for name, entry in header.entries.items()}
        self._check_order(header)
        self.stored = sum(map(prod, self.shapes.values()))
        self.mask: MaskFile | None = None
        if self.info.kind == "sparse":
            self.mask_key = _mask_key(store, key, self.info)
            self.mask = self._open_mask(masks or OpenMasks())

    def _one_dtype(self, header: Header) -> torch.dtype:
        names = {entry.dtype for entry in header.entries.values()}
        if len(names) != 1 or not names <= _DTYPES.keys():
            raise VectorError(
                f"{self.where}: dtypes {sorted(names)}; a vector file has one, F32 or BF16"
            )
        return _DTYPES[names.pop()]

    def _check_order(self, header: Header) -> None:
        """Raise VectorError unless the tensors lie without gaps, in the order of their names."""
        if list(self.shapes) != sorted(self.shapes):
            raise VectorError(f"{self.where}: tensors are not in the order of their names")
        end = 0
        for name, entry in header.entries.items():
            begin, end = end, end + prod(entry.shape) * self.dtype.itemsize
            if (entry.begin, entry.end) != (begin, end):
                raise VectorError(
                    f"{self.where}: shape and place of {name} do not fit; the file is damaged"
                )

    def _open_mask(self, masks: OpenMasks) -> MaskFile:
        expected = str(self.info.mask_fingerprint)
        mask = masks.open(self.store, self.mask_key, expected)
        if mask.fingerprint != expected or mask.kept != self.stored:
            raise VectorError(
                f"{self.where} was made with another mask than {self.store.where(self.mask_key)}"
            )
        return mask

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> VectorFile:
        """Open a vector file by its path or URL, outside of any experiment.

        The root of the file's store is chosen so that the mask is in the store too. Raises as the
        constructor.
        """
        folder, name = posixpath.split(os.fspath(url))
        folder = Store(folder or ".").url  # absolute, so that the path has all its levels
        levels: list[str] = []
        info = Header.read(CheckedFile(Store(folder), name, None)).info
        for _ in range(str(info.get("mask", "")).count("../")):
            above, last = posixpath.split(folder)
            if not last or above.endswith(":/"):  # `folder` is the root, or a bucket
                break
            folder = above
            levels.insert(0, last)
        return cls(Store(folder), posixpath.join(*levels, name))

    @property
    def where(self) -> str:
        """The file's path, for messages."""
        return self.store.where(self.key)

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole parameters by name, even if only some entries are stored."""
        return self.shapes if self.mask is None else self.mask.shapes

    def byte_range(self, start: int, stop: int) -> tuple[int, int]:
        """First and last byte (exclusive) of the stored values start..stop in the file."""
        width = self.dtype.itemsize
        return self.data_start + start * width, self.data_start + stop * width

    def check_header(self) -> None:
        """Compare the file's header with its record. Raises DamagedError if it differs."""
        self._header.check()

    def read_into(self, start: int, out: Tensor) -> None:
        """Read stored values start..start + len(out) into `out` (n,), float32 and contiguous.

        Raises VectorError if the vector ends before, and DamagedError for bytes that differ from
        the record.
        """
        raw = out if self.dtype == out.dtype else torch.empty(len(out), dtype=self.dtype)
        first, last = self.byte_range(start, start + len(out))
        if start + len(out) > self.stored:
            raise VectorError(
                f"{self.where} has {self.stored} values, not {start}..{start + len(out)}"
            )
        self.check_header()
        self._file.read_into(first, raw.view(torch.uint8).numpy().data[: last - first])
        if raw is not out:
            out.copy_(raw)

    def values(self, start: int, stop: int) -> Tensor:
        """Stored values start..stop as float32."""
        out = torch.empty(max(0, stop - start))
        self.read_into(start, out)
        return out

    def not_finite(self) -> list[str]:
        """Names of the tensors with NaN or infinite values; reads the whole file in blocks."""
        bad: list[str] = []
        start = 0
        for name, shape in self.shapes.items():
            stop = start + prod(shape)
            if not self._is_finite(start, stop):
                bad.append(name)
            start = stop
        return bad

    def _is_finite(self, start: int, stop: int) -> bool:
        step = 16 * BLOCK
        for first in range(start, stop, step):
            values = self.values(first, min(first + step, stop))
            if not bool(torch.isfinite(values).all()):
                return False
        return True

    def complain(self) -> VectorError:
        """The error for a vector whose inner products are not finite. It names the bad tensors."""
        bad = self.not_finite()
        if not bad:
            return VectorError(f"{self.where} has values so large that their products are infinite")
        names = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        return VectorError(f"{self.where} has NaN or infinite values in {names}")
