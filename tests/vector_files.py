"""Vector files made for tests, and readers of them that only know safetensors."""

import json
import os
import posixpath
import re
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from raytvb.experiment.inventory import verify_store
from raytvb.storage import records
from raytvb.storage.basis_layout import tag_of
from raytvb.storage.masks import Mask
from raytvb.storage.records import FileInfo
from raytvb.storage.replacing import tagged
from raytvb.storage.store import Store
from raytvb.storage.vector_set import VectorSet
from raytvb.storage.vectors import VECTOR, VectorFile, vector_bytes, vector_info

Shapes = dict[str, tuple[int, ...]]
SHAPES: Shapes = {
    "visual.b.weight": (7, 19),
    "visual.a": (3, 2, 5),
    "visual.c": (1,),
    "visual.B": (41,),
}
BIG: Shapes = {
    "visual.weight": (300, 701),
    "visual.bias": (13,),
}  # more than three blocks of the mask's counts
KINDS = ("dense", "shared", "per-task", "mixed")
DTYPES = {
    "fp32": (torch.float32,),
    "bf16": (torch.bfloat16,),
    "both": (torch.float32, torch.bfloat16),
}


def values_of(shapes: Shapes, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def random_mask(shapes: Shapes, seed: int, density: float = 0.3) -> Mask:
    """A mask that keeps nothing of the first two tensors by name, if there are more than two."""
    generator = torch.Generator().manual_seed(seed)
    mask = {n: torch.rand(s, generator=generator) < density for n, s in shapes.items()}
    for name in sorted(shapes)[:2] if len(shapes) > 2 else ():
        mask[name][:] = False
    return Mask.of(mask)


def put_mask(store: Store, name: str, mask: Mask) -> str:
    key = f"masks/{name}/mask.safetensors"
    store.write(key, mask.to_bytes())
    return key


def vector_data(
    task: str, values: dict[str, Tensor], mask: Mask | None, mask_name: str, base: str
) -> bytes:
    """The bytes of the vector file of a task: dense, or with its mask in the folder
    masks/<mask_name> of the same store.
    """
    if mask is None:
        return vector_bytes(values, vector_info(base))
    path = posixpath.relpath(f"masks/{mask_name}/mask.safetensors", f"vectors/{task}")
    kept = mask.tensors()
    return vector_bytes(
        {n: v[kept[n]] for n, v in values.items()},
        vector_info(base, mask_path=path, mask=mask.fingerprint),
    )


def put_vector(
    store: Store,
    task: str,
    values: dict[str, Tensor],
    mask: Mask | None = None,
    mask_name: str = "shared",
    base: str = "base-1",
) -> str:
    """Store `values`, sparse if there is a mask. Returns the key."""
    key = f"vectors/{task}/{VECTOR}"
    if mask is not None:
        put_mask(store, mask_name, mask)
    store.write(key, vector_data(task, values, mask, mask_name, base))
    return key


def record_vector(store: Store, task: str) -> None:
    """Commit the vector file that `put_vector` has stored."""
    prefix = f"vectors/{task}"
    key = f"{prefix}/{VECTOR}"
    fingerprint = VectorFile(store, key).info.mask_fingerprint
    records.commit(
        store,
        prefix,
        identity={},
        written={VECTOR: FileInfo.of(store.read(key))},
        parents={} if fingerprint is None else {"mask": fingerprint},
    )


def flat(values: dict[str, Tensor], mask: Mask | None = None) -> Tensor:
    """The dense vector (D,) float64 that a file of these values stands for."""
    whole = torch.cat([values[n].reshape(-1) for n in sorted(values)]).double()
    return whole if mask is None else whole * mask.bits


def put_set(
    store: Store,
    kind: str,
    shapes: Shapes = SHAPES,
    count: int = 5,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> tuple[list[str], Tensor]:
    """Store `count` vectors of a kind, dtypes taking turns: their keys, and V (D, count) float64.

    mixed: every second one is dense. Masks of its own: two vectors each have the same.
    """
    keys, columns = [], []
    for t in range(count):
        values = values_of(shapes, seed=t, dtype=dtypes[t % len(dtypes)])
        sparse = kind in ("shared", "per-task") or (kind == "mixed" and t % 2 == 1)
        mask = (
            random_mask(shapes, seed=99 if kind == "shared" else 100 + t // 2) if sparse else None
        )
        name = "shared" if kind == "shared" else f"own-{t // 2}"
        keys.append(put_vector(store, f"suite/task-{t}", values, mask, name))
        columns.append(flat(values, mask))
    return keys, torch.stack(columns, dim=1)


def common(kind: str, V: Tensor, shapes: Shapes = SHAPES) -> Tensor:
    """The rows of V that are coordinates of a set of that kind: the kept ones where all share a
    mask.
    """
    return V[random_mask(shapes, 99).bits] if kind == "shared" else V


def paths_of(store: Store, keys: Sequence[str]) -> list[str]:
    return [store.where(key) for key in keys]


def open_set(store: Store, keys: Sequence[str]) -> VectorSet:
    return VectorSet([VectorFile(store, k) for k in keys])


def flip(store: Store, key: str, position: int, bit: int = 0) -> None:
    """Change one bit of a local file in place. A negative position counts from its end."""
    with open(store.path(key), "r+b") as file:
        file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 1 << bit]))


def truncate(store: Store, key: str, size: int) -> None:
    """Cut a file to its first `size` bytes. A negative size cuts off that many bytes at the end."""
    store.write(key, store.read(key)[:size])


def problems_of(store: Store) -> list[str]:
    """What `verify` finds in a store that has no model, and masks that were put there as files."""
    lines = []
    for problem in sorted(verify_store(store).problems):
        if not problem.key.startswith(("base/", "masks/", "overlap/")):
            lines.append(str(problem))
    return lines


def metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    fields: dict[str, str] = header["__metadata__"]
    return fields


def dense(store: Store, key: str) -> Tensor:
    """A stored vector (D,) float64, zero where its mask keeps nothing."""
    data = store.read(key)
    info, tensors = json.loads(metadata(data)["raytvb"]), load(data)
    values = torch.cat([tensors[n].reshape(-1) for n in sorted(tensors)]).double()
    if info["kind"] == "dense":
        return values
    mask = store.read(posixpath.normpath(posixpath.join(posixpath.dirname(key), info["mask"])))
    shapes = json.loads(metadata(mask)["raytvb"])["shapes"]
    bits = np.unpackbits(
        load(mask)["bits"].numpy(), count=sum(map(prod, shapes.values())), bitorder="little"
    )
    out = torch.zeros(len(bits), dtype=torch.float64)
    out[torch.from_numpy(bits.astype(bool))] = values
    return out


def glued(store: Store, folder: str) -> Tensor:
    """The vectors of a basis (D or kept, M) float64, put together from its files by its index.

    Checks that the index lists every tensor of every file in the folder, and nothing else, and
    their bytes.
    """
    record = records.find(store, folder)
    tag = "" if record is None else tag_of(record.files)
    index = store.read_json(f"{folder}/{tagged('basis.safetensors.index.json', tag)}")
    where, total = index["weight_map"], 0
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    names = set()
    for key in store.keys(folder):
        name = key.rpartition("/")[2]
        if name.startswith("basis-") and name.endswith(".safetensors"):
            names.add(name)
    assert names == set(where.values())
    for name in sorted(names):
        tensors = load(store.read(f"{folder}/{name}"))
        assert tensors.keys() == {tensor for tensor, file in where.items() if file == name}
        for tensor, values in tensors.items():
            assert values.dtype == torch.float32
            total += values.numel() * values.element_size()
            cut = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", tensor)
            parts.setdefault(cut[1] if cut else tensor, []).append(
                (int(cut[2]) if cut else 0, values.flatten(1))
            )
            assert cut is None or values.shape[1] == int(cut[3]) - int(cut[2])
    assert total == index["metadata"]["total_size"]
    rows = []
    for parameter in sorted(parts):
        end = 0
        for start, values in sorted(parts[parameter], key=lambda part: part[0]):
            assert start == end
            end += values.shape[1]
            rows.append(values)
    return torch.cat(rows, dim=1).T.double()


def close_to(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    """Assert that two Gram matrices differ by no more than the tolerance times the norms of the two
    vectors.
    """
    norms = expected.diagonal().sqrt()
    return bool(((found - expected).abs() <= tolerance * torch.outer(norms, norms)).all())
