"""TALL masks (Wang et al., arXiv 2405.07813): which entries of a multi-task vector a task uses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from raytvb.maths.row_sums import sum_rows
from raytvb.maths.thresholds import check_vectors


def multi_task_vector(vectors: Tensor, merged: Tensor | None) -> Tensor:
    """The multi-task vector (*shape) in float64: `merged`, or the sum of the vectors (T, *shape).

    Raises ValueError for a merged vector of another shape.
    """
    shape = check_vectors(vectors).shape[1:]
    if merged is None:
        return sum_rows(vectors, vectors)
    if merged.shape != shape:
        raise ValueError(
            f"a merged vector of shape {tuple(merged.shape)} for {tuple(vectors.shape)} vectors"
        )
    return merged.double()


def tall_masks(vectors: Tensor, strength: float | Tensor, multi: Tensor) -> Iterator[Tensor]:
    """The mask (*shape) bool of each task: |tau_t| > lambda_t |tau_multi - tau_t|.

    strength: lambda, one number >= 0 or (T,) of them. Raises ValueError for anything else.
    """
    strengths = torch.as_tensor(strength, dtype=torch.float64)
    if strengths.shape not in ((), (len(vectors),)) or not (strengths >= 0).all():
        raise ValueError(f"strength must be one number >= 0, or {len(vectors)} of them")
    scales = strengths.expand(len(vectors)).tolist()
    for row, scale in zip(vectors, scales, strict=True):
        yield row.double().abs() > scale * (multi - row.double()).abs()
