"""Sums over task vectors that are handed over one by one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def sum_rows(rows: Iterable[Tensor], like: Tensor) -> Tensor:
    """Sum (*shape) float64 of rows (*shape), which are added one after the other.

    like: (T, *shape). The sum takes its shape and device from it.
    """
    total = torch.zeros(like.shape[1:], dtype=torch.float64, device=like.device)
    for row in rows:
        total += row
    return total
