"""Iso-C: the task sum with a flat spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.merge_methods.mean import task_mean
from raytvb.maths.merge_methods.sum import task_sum
from raytvb.maths.merge_registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    "iso-c",
    summary="Iso-C: the sum of each matrix with all singular values equal",
    coefficient="one",
    matrices=True,
)
def iso_c(vectors: Tensor) -> Tensor:
    """Iso-C (Marczak et al., arXiv 2502.04959, sec. 4): the task sum, all singular values equal.

    With sum_t tau_t = U S V^T of shape (m, n) the result is mean(diag S) U V^T: all min(m, n)
    directions have the same singular value. If the sum has a lower rank, the remaining directions
    are arbitrary, as in the authors' code. Parameters of other than two dimensions are averaged, as
    in the authors' code. The SVD is in float32.

    Iso-CTS, with task-specific directions, is not implemented.
    """
    import torch

    from raytvb.maths.thresholds import check_vectors

    if check_vectors(vectors).ndim != 3:
        return task_mean(vectors)
    U, s, Vh = torch.linalg.svd(task_sum(vectors), full_matrices=False)
    merged: Tensor = s.mean() * (U @ Vh)
    return merged
