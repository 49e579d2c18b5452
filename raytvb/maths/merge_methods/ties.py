"""TIES: trim, elect signs, average what agrees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.merge_registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    "ties",
    summary="TIES: large entries only, averaged where their signs agree",
    coefficient="one",
    needs=("thresholds",),
)
def ties(vectors: Tensor, *, thresholds: Tensor) -> Tensor:
    """TIES (Yadav et al., arXiv 2306.01708, algorithm 1): trim, elect signs, average what agrees.

    With t_t the `trimmed` vectors and s = sgn(sum_t t_t), the result (*shape) is the mean over
    {t : sgn(t_t) = s} of t_t, entry by entry. Sums are in float64.

    thresholds (T,): from `global_thresholds`. The paper's default density is 0.2, and its alpha is
    1.

    An entry whose trimmed values cancel exactly has no sign and becomes 0, as in the paper's
    formula; the authors' code gives it the sign that prevails over the whole vector.
    """
    import torch

    from raytvb.maths.row_sums import sum_rows
    from raytvb.maths.trimming import trimmed_rows

    elected = sum_rows(trimmed_rows(vectors, thresholds), vectors).sign()
    total, agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
    for row in trimmed_rows(vectors, thresholds):
        agrees = row.sign() == elected
        total += torch.where(agrees, row, 0.0)
        agreeing += agrees
    return (total / agreeing.clamp(min=1)).float()
