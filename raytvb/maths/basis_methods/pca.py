"""Principal components with the mean stored beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.basis_registry import basis_method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raytvb.maths.gram_factor import GramFactor


@basis_method(
    "pca",
    summary="the mean and M - 1 principal components; the sum of all tasks is exact",
    cost="O(T³): eigenvectors of the centred Gram matrix, once for all sizes",
    extra=1,
)
def pca(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The mean vector and M − 1 components of the centred vectors: M stored vectors in all.

    W = [1ᵀ; Cᵀ], with C (T, M − 1) the coefficients of the components.
    """
    import torch

    tasks = len(vectors.G_TT)
    C_TK = vectors.centred[:, : size - 1]
    C_TK = C_TK - C_TK.mean(0)  # already centred, unless the eigenvalue is zero
    ones_T1 = torch.ones(tasks, 1, dtype=torch.float64)
    return torch.cat([ones_T1 / tasks, C_TK], 1), torch.cat([ones_T1, C_TK], 1).T.contiguous()
