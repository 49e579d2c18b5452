"""Baseline: a random subset of the task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.basis_registry import basis_method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raytvb.maths.gram_factor import GramFactor


@basis_method(
    "random-subset",
    summary="baseline: M of the task vectors, drawn at random",
    cost="O(T²·M): least squares for the coefficients",
    convex=True,
)
def random_subset(
    vectors: GramFactor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """M of the vectors, drawn at random without replacement."""
    import torch

    order_T = torch.randperm(len(vectors.G_TT), generator=generator)
    return vectors.subset(order_T[:size].tolist())
