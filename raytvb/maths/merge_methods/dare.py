"""DARE with task arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.merge_registry import merge_method

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@merge_method(
    "dare",
    summary="DARE: most entries dropped at random, the others scaled up, then summed",
    coefficient="sum",
    needs=("generator",),
)
def dare(vectors: Tensor, *, rate: float = 0.9, generator: torch.Generator) -> Tensor:
    """DARE with task arithmetic (Yu et al., arXiv 2311.03099): the sum of the `dropped` vectors."""
    from raytvb.maths.row_sums import sum_rows
    from raytvb.maths.trimming import dropped_rows

    return sum_rows(dropped_rows(vectors, rate, generator), vectors).float()
