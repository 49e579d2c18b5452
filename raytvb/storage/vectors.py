"""Vector files: what is on disk, and reading it in blocks so that memory is bounded by the block,
never by T * D.

A vector file is a safetensors file of one dtype with tensors in the order of their sorted names, so
its data section is one flat array and a range of coordinates is a range of bytes. Its only metadata
key, `raytvb`, is JSON without times, URLs or machine names, so equal vectors are equal files. A
sparse vector has per parameter the 1-D kept values and names its mask file relative to itself.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.maths.gram import BLOCK
from raytvb.storage.header import FORMAT, Header
from raytvb.storage.masks import MaskFile
from raytvb.storage.store import Store

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def vector_info(
    base: str, *, mask_path: str | None = None, mask: str | None = None
) -> dict[str, Any]:
    """Metadata of a vector file: fingerprint of the base, and path and fingerprint of the mask
    where it is sparse.
    """
    info: dict[str, Any] = {
        "base": base,
        "format": FORMAT,
        "kind": "dense" if mask is None else "sparse",
    }
    return info if mask is None else info | {"mask": mask_path, "mask_fingerprint": mask}


def vector_bytes(values: Mapping[str, Tensor], info: Mapping[str, Any]) -> bytes:
    """A vector file: dense parameter tensors, or per parameter the 1-D kept values. One dtype, fp32
    or bf16.
    """
    dtypes = {t.dtype for t in values.values()}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        raise ValueError(
            f"a vector file has one dtype, float32 or bfloat16, not {', '.join(map(str, dtypes))}"
        )
    tensors = {n: t.detach().cpu().contiguous() for n, t in values.items()}
    return save(tensors, metadata={"raytvb": json.dumps(dict(info), sort_keys=True)})


class VectorFile:
    """One vector in a store, read by ranges; opening it reads its header (and its mask's) only."""

    def __init__(self, store: Store, key: str) -> None:
        """Raises VectorError for a file that is truncated, of mixed dtype or not a vector file."""
        self.store, self.key = store, key
        header = Header.read(store, key)
        self.info, self.data_start = header.info, header.start
        sparse = self.info.get("kind") == "sparse"
        missing = {"base", *(("mask", "mask_fingerprint") if sparse else ())} - self.info.keys()
        if missing:
            raise VectorError(
                f"{self.where} is no vector file: its metadata has no {', '.join(sorted(missing))}"
            )
        dtypes = {e["dtype"] for e in header.entries.values()}
        if len(dtypes) != 1 or not dtypes <= _DTYPES.keys():
            raise VectorError(
                f"{self.where}: dtypes {sorted(dtypes)}; a vector file has one, F32 or BF16"
            )
        self.dtype = _DTYPES[dtypes.pop()]
        self.shapes = {n: tuple(e["shape"]) for n, e in header.entries.items()}
        if list(self.shapes) != sorted(self.shapes):
            raise VectorError(f"{self.where}: tensors are not in the order of their names")
        self.stored = 0
        for name, entry in header.entries.items():
            first, self.stored = self.stored, self.stored + prod(entry["shape"])
            if entry["data_offsets"] != [
                first * self.dtype.itemsize,
                self.stored * self.dtype.itemsize,
            ]:
                raise VectorError(
                    f"{self.where}: shape and place of {name} do not fit; the file is damaged"
                )
        self.mask: MaskFile | None = None
        if sparse:
            folder = posixpath.dirname(key)
            self.mask_key = posixpath.normpath(posixpath.join(folder, self.info["mask"]))
            if self.mask_key.startswith(("../", "/")):
                raise VectorError(
                    f"{self.where}: its mask {self.info['mask']} lies outside of {store.url}"
                )
            self.mask = MaskFile(store, self.mask_key)
            if (
                self.mask.fingerprint != self.info["mask_fingerprint"]
                or self.mask.kept != self.stored
            ):
                raise VectorError(
                    f"{self.where} was made with another mask than {store.where(self.mask_key)}"
                )

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> VectorFile:
        """From a path or URL outside of any experiment. The store is rooted where the mask can be
        reached too.
        """
        url = os.fspath(url)
        folder, name = posixpath.split(url)
        folder = Store(folder or ".").url  # absolute, so that the levels below are all there
        levels: list[str] = []
        header = Header.read(Store(folder), name)
        for _ in range(str(header.info.get("mask", "")).count("../")):
            above, last = posixpath.split(folder)
            if not last or above.endswith(":/"):  # the root, or a bucket
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
        """Shapes of the parameters by name, also where only some of their entries are stored."""
        if self.mask is None:
            return self.shapes
        return {n: tuple(s) for n, s in sorted(self.mask.info["shapes"].items())}

    def byte_range(self, start: int, stop: int) -> tuple[int, int]:
        """Where stored values start..stop lie in the file."""
        width = self.dtype.itemsize
        return self.data_start + start * width, self.data_start + stop * width

    def read_into(self, start: int, out: Tensor) -> None:
        """Stored values start..start + len(out) into `out`, float32 and contiguous."""
        raw = out if self.dtype == out.dtype else torch.empty(len(out), dtype=self.dtype)
        first, last = self.byte_range(start, start + len(out))
        if start + len(out) > self.stored:
            raise VectorError(
                f"{self.where} has {self.stored} values; {start}..{start + len(out)} were asked for"
            )
        self.store.read_into(self.key, first, raw.view(torch.uint8).numpy().data[: last - first])
        if raw is not out:
            out.copy_(raw)

    def values(self, start: int, stop: int) -> Tensor:
        """Stored values start..stop as float32."""
        out = torch.empty(max(0, stop - start))
        self.read_into(start, out)
        return out

    def not_finite(self) -> list[str]:
        """Names of the tensors with NaN or infinite values; reads the whole file in blocks."""
        bad, first = [], 0
        for name, shape in self.shapes.items():
            last = first + prod(shape)
            parts = (
                self.values(a, min(a + 16 * BLOCK, last)) for a in range(first, last, 16 * BLOCK)
            )
            if not all(bool(torch.isfinite(p).all()) for p in parts):
                bad.append(name)
            first = last
        return bad

    def complain(self) -> VectorError:
        """The error for a vector whose inner products are not finite, naming tensors."""
        bad = self.not_finite()
        if not bad:
            return VectorError(f"{self.where} has values so large that their products are infinite")
        names = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        return VectorError(f"{self.where} has NaN or infinite values in {names}")
