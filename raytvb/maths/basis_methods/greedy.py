"""A subset of the task vectors, chosen one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.basis_registry import basis_method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raytvb.maths.gram_factor import GramFactor


@basis_method(
    "greedy",
    summary="M of the task vectors: each time the one worst explained by those before",
    cost="O(T³): one pivoted QR, once for all sizes",
    convex=True,
)
def greedy(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """M of the task vectors, chosen one after the other: always the vector that those chosen before
    explain worst.

    These are the pivots of a column-pivoted Cholesky factorisation of G.
    """
    return vectors.subset(vectors.pivots[:size])
