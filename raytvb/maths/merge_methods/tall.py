"""TALL masks: what at least one task uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.merge_methods.consensus import consensus
from raytvb.maths.merge_registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    "tall",
    summary="TALL masks: the sum, where at least one task uses an entry",
    coefficient="sum",
)
def tall(
    vectors: Tensor, *, strength: float | Tensor = 0.4, merged: Tensor | None = None
) -> Tensor:
    """The sum where any TALL mask has an entry: `consensus` with least = 1.

    It sets the entries that no task uses to zero. The paper calls these catastrophic weights.
    """
    return consensus(vectors, least=1, strength=strength, merged=merged)
