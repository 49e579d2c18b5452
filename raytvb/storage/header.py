"""The header that all our safetensors files share."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytvb.errors import VectorError
from raytvb.storage.store import Store

FORMAT = 1


@dataclass(frozen=True)
class Header:
    """A safetensors header: entries by name as {dtype, shape, data_offsets}, and where the data
    section starts.
    """

    entries: Mapping[str, Any]
    info: Mapping[str, Any]
    start: int

    @classmethod
    def read(cls, store: Store, key: str) -> Header:
        """Raises VectorError for a file that is not whole, or has no metadata of ours."""
        where, size = store.where(key), store.size(key)
        try:
            if size < 8:
                raise ValueError(f"it has {size} bytes")
            length = struct.unpack("<Q", store.read_range(key, 0, 8))[0]
            if not 2 <= length <= size - 8:
                raise ValueError(f"its header claims {length} bytes of a file of {size}")
            raw = json.loads(store.read_range(key, 8, 8 + length))
            if "raytvb" not in raw.get("__metadata__", {}):
                raise ValueError("it has no `raytvb` metadata; `raytvb.vector_bytes` writes it")
            info = dict(json.loads(raw.pop("__metadata__")["raytvb"]))
            if not all(
                {"dtype", "shape", "data_offsets"} <= entry.keys() for entry in raw.values()
            ):
                raise ValueError("its header leaves dtype, shape or place of a tensor out")
            end = max((e["data_offsets"][1] for e in raw.values()), default=0)
            if 8 + length + end != size:
                raise ValueError(f"it has {size} bytes, its header describes {8 + length + end}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise VectorError(f"{where} is not a whole raytvb safetensors file: {error}") from None
        ordered = dict(sorted(raw.items(), key=lambda item: item[1]["data_offsets"][0]))
        return cls(ordered, info, 8 + length)
