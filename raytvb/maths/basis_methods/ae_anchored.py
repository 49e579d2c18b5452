"""The autoencoder basis with the mean task vector as its first vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.basis_registry import basis_method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raytvb.maths.gram_factor import GramFactor
    from raytvb.maths.online_refit import Atoms


def refit(atoms: Atoms, size: int) -> Tensor:
    """Convex combinations spread around the mean of all tasks, which is the first of them."""
    from raytvb.maths.online_refit import spread_around

    return spread_around(atoms, atoms.centre, size)


@basis_method(
    "ae-anchored",
    summary="like ae, with the mean as first vector: the sum of all tasks is exact",
    cost="O(T²·M) for each of 35 to 150 steps of L-BFGS, from 1 or 2 starts",
    convex=True,
    extra=1,
    online=refit,
)
def ae_anchored(
    vectors: GramFactor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Like `ae` with u = 1/T as the first column: the mean task vector.

    V u lies in the span of the basis, so the decoded sum of all tasks is exact at any M.
    """
    from raytvb.maths.simplex_columns import columns_beside_mean

    B_TM = columns_beside_mean(vectors, size)
    return B_TM, vectors.weights(B_TM)
