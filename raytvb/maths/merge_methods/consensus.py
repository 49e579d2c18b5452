"""Consensus merging: what at least two tasks use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.merge_registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    "consensus",
    summary="Consensus: the sum, where at least two tasks use an entry",
    coefficient="sum",
)
def consensus(
    vectors: Tensor, *, least: int = 2, strength: float | Tensor = 0.4, merged: Tensor | None = None
) -> Tensor:
    """Consensus merging (Wang et al., arXiv 2405.07813): the sum where `least` TALL masks agree.

    tau_merged * [sum_t m_t >= least], with TALL masks m_t = |tau_t| > lambda_t |tau_merged -
    tau_t|.

    Args:
        vectors: (T, *shape).
        least: how many tasks must use an entry. 2 removes entries that no task uses (catastrophic)
            and entries that one task uses (selfish). More than T removes everything, so a single
            task needs 1.
        strength: lambda, one number or (T,). Simplified: the paper picks it per task on validation
            data.
        merged: (*shape), tau_merged; default: the sum of the vectors.

    Returns (*shape) float32. Raises ValueError for a negative strength and for other shapes.
    """
    import torch

    from raytvb.maths.tall_masks import multi_task_vector, tall_masks

    multi = multi_task_vector(vectors, merged)
    votes = torch.zeros(multi.shape, dtype=torch.int64, device=vectors.device)
    for mask in tall_masks(vectors, strength, multi):
        votes += mask
    return torch.where(votes >= least, multi, 0.0).float()
