"""Merge methods of the literature on stored vectors, one parameter at a time: merged, or prepared
for a basis.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from raytvb.maths.merge_methods import MATRIX_METHODS, MERGE
from raytvb.maths.thresholds import global_thresholds
from raytvb.storage.vector_set import Coordinates, VectorSet


def method_direction(vectors: Coordinates, tasks: Tensor, method: str, seed: int = 0) -> Tensor:
    """method(tau_1, ..., tau_n) float32, with tau_i = sum_f tasks[f, i] * vectors[f].

    Args:
        vectors: the F stored ones.
        tasks: (F, n) float64.
        method: of `methods.MERGE`, but for fisher, with the papers' settings.
        seed: of the draws of dare.
    Returns the vectors' coordinates (count,) where the method goes entry by entry: of sparse
    vectors it sees the kept entries only. Methods of matrices see whole ones and fill them, so
    theirs is of all parameters (D,), names sorted.
    Memory: beside the result n of one parameter, and the F (of a `VectorSet`: those with weight)
    they are made of.
    """
    vectors, tasks = _used(vectors, tasks)
    factors = tasks.T.to(torch.float32).contiguous()
    scales = factors.diagonal()[:, None]
    diagonal = torch.equal(factors, scales[:, 0].diag())
    kept = None if vectors.mask is None else vectors.mask.load().tensors()

    def parameters() -> Iterator[tuple[str, Tensor]]:
        """Each parameter of tau_1 ... tau_n: (n, *shape), or (n, kept) where there is a mask."""
        first = 0
        for name, shape in vectors.parameters.items():
            count = prod(shape) if kept is None else int(kept[name].sum())
            rows = vectors.read_all(first, count)
            # Vectors as they are stored need no n^2 products.
            rows = rows * scales if diagonal else factors @ rows
            yield name, rows.view(len(rows), *shape) if kept is None else rows
            first += count

    options: dict[str, Any] = {}
    if method == "ties":
        options = {"thresholds": global_thresholds(lambda: (rows for _, rows in parameters()))}
    elif method == "dare":
        options = {"generator": torch.Generator().manual_seed(seed)}
    filled = kept if method in MATRIX_METHODS else None
    total = vectors.count if filled is None else sum(prod(s) for s in vectors.parameters.values())
    out, first = torch.empty(total), 0
    for name, rows in parameters():
        whole = rows if filled is None else _whole(rows, filled[name])
        merged = MERGE[method](whole, **options).reshape(-1)
        out[first : first + len(merged)] = merged
        first += len(merged)
    return out


def _used(vectors: Coordinates, tasks: Tensor) -> tuple[Coordinates, Tensor]:
    """Without the vectors that no task has weight for, where they can be left unread."""
    used = tasks.any(dim=1).nonzero()[:, 0].tolist()
    if not isinstance(vectors, VectorSet) or len(used) in (0, len(tasks)):
        return vectors, tasks
    chosen = VectorSet([vectors.files[i] for i in used])
    # Some of the vectors may have less in common than all of them.
    chosen.compact, chosen.mask, chosen.count = vectors.compact, vectors.mask, vectors.count
    return chosen, tasks[used]


def _whole(rows: Tensor, kept: Tensor) -> Tensor:
    """Kept entries (n, k) in their places, with zeros between them: (n, *shape); kept: bool of that
    shape.
    """
    out = torch.zeros(len(rows), kept.numel())
    out[:, kept.reshape(-1)] = rows
    return out.view(len(rows), *kept.shape)
