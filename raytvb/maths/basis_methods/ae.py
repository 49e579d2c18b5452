"""The autoencoder basis of Zeng et al. (arXiv 2502.01015): the default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.basis_registry import basis_method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raytvb.maths.gram_factor import GramFactor
    from raytvb.maths.online_refit import Atoms


def refit(atoms: Atoms, size: int) -> Tensor:
    """Convex combinations spread around the mean of all tasks, moved towards the incremental SVD.

    The mean is moved only as far as every task keeps its least share: see `online_refit`.
    """
    from raytvb.maths.online_refit import moved_towards, spread_around

    point_K = moved_towards(atoms, atoms.principal(size))
    return spread_around(atoms, point_K, size)


@basis_method(
    "ae",
    summary="convex combinations with the least error (autoencoder): the default",
    cost="O(T²·M) for each of 35 to 150 steps of L-BFGS, from 1 to 12 starts",
    convex=True,
    online=refit,
)
def ae(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """B has columns on the simplex with the least loss, as well conditioned as that loss allows."""
    from raytvb.maths.simplex_columns import least_loss_columns

    B_TM = least_loss_columns(vectors, size, generator)
    return B_TM, vectors.weights(B_TM)
