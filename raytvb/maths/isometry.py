"""Matrices with orthonormal columns, and which of their directions are only rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_isometry(factors: Tensor) -> Tensor:
    """The partial isometry nearest to factors (m, K): P Q' of their SVD P D Q'.

    Directions whose singular value is zero, up to rounding, are left out.
    """
    P, lengths, Q = torch.linalg.svd(factors, full_matrices=False)
    nearest: Tensor = (P * (lengths > rounding_level(factors) * lengths.max())) @ Q
    return nearest


def rounding_level(matrix: Tensor) -> float:
    """Singular values below this fraction of the largest are rounding, as in
    `torch.linalg.matrix_rank`.
    """
    return max(matrix.shape) * torch.finfo(torch.float32).eps
