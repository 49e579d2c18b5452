"""Task arithmetic: the plain sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.merge_registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method("sum", summary="task arithmetic: the plain sum", coefficient="sum")
def task_sum(vectors: Tensor) -> Tensor:
    """Task arithmetic (Ilharco et al., arXiv 2212.04089): sum_t tau_t, accumulated in float64."""
    from raytvb.maths.row_sums import sum_rows
    from raytvb.maths.thresholds import check_vectors

    return sum_rows(check_vectors(vectors), vectors).float()
