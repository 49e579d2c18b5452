"""The singular value decomposition: the least loss that any M vectors can have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.basis_registry import basis_method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raytvb.maths.gram_factor import GramFactor
    from raytvb.maths.online_refit import Atoms


def refit(atoms: Atoms, size: int) -> Tensor:
    """Incremental SVD: the top left singular vectors of all tasks so far, times their values.

    Brand, "Incremental singular value decomposition of uncertain data with missing values", ECCV
    2002. If all tasks are zero, the mix is the first task, since a basis has at least one vector.
    """
    mix_KM = atoms.principal(size)
    return mix_KM if mix_KM.shape[1] else atoms.P_Kn[:, :1]


@basis_method(
    "svd",
    summary="the top M singular directions, not centred: the least error possible",
    cost="O(1): the eigenvectors are the basis",
    online=refit,
)
def svd(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The top M singular directions of V, not centred: the floor itself.

    B = U_M and W = U_Mᵀ, with U the eigenvectors of G.
    """
    B_TM = vectors.U_TR[:, :size]
    return B_TM, B_TM.T.contiguous()
