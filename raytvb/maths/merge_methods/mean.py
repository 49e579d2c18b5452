"""Model soups: the mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.merge_registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method("mean", summary="the mean of the fine-tuned weights", coefficient="one")
def task_mean(vectors: Tensor) -> Tensor:
    """Uniform averaging of the fine-tuned weights (Wortsman et al., arXiv 2203.05482).

    It is sum_t tau_t / T, accumulated in float64.
    """
    from raytvb.maths.row_sums import sum_rows
    from raytvb.maths.thresholds import check_vectors

    return (sum_rows(check_vectors(vectors), vectors) / len(vectors)).float()
