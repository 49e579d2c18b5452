"""Baseline: a random projection of the task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.basis_registry import basis_method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raytvb.maths.gram_factor import GramFactor


@basis_method(
    "random-projection",
    summary="baseline: random orthonormal combinations of the task vectors",
    cost="O(T²·M): one QR, and least squares for the coefficients",
)
def random_projection(
    vectors: GramFactor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """B with random orthonormal columns: the Q of a QR of normal draws."""
    import torch

    draws_TM = torch.randn(len(vectors.G_TT), size, dtype=torch.float64, generator=generator)
    B_TM = torch.linalg.qr(draws_TM)[0]
    return B_TM, vectors.weights(B_TM)
