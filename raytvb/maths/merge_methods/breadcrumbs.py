"""Model Breadcrumbs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.merge_registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    "breadcrumbs",
    summary="Model Breadcrumbs: both tails of each layer dropped, then summed",
    coefficient="sum",
)
def breadcrumbs(vectors: Tensor, *, beta: float = 0.85, gamma: float = 0.994) -> Tensor:
    """Model Breadcrumbs (Davari & Belilovsky, arXiv 2312.06795): the `sparsified` sum."""
    from raytvb.maths.row_sums import sum_rows
    from raytvb.maths.trimming import sparsified_rows

    return sum_rows(sparsified_rows(vectors, beta, gamma), vectors).float()
