"""Fisher-weighted averaging."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.merge_registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    "fisher",
    summary="averaging weighted by each task's diagonal Fisher information",
    coefficient="one",
    needs=("fishers",),
)
def fisher(vectors: Tensor, *, fishers: Tensor, weights: Tensor | None = None) -> Tensor:
    """Fisher-weighted averaging (Matena & Raffel, arXiv 2111.09832).

    The result (*shape) is sum_t l_t F_t tau_t / sum_t l_t F_t, with sums in float64. An entry where
    all l_t F_t are 0 becomes the average with weights l_t. The authors' code has a floor of 1e-6
    under the first model's Fisher instead.

    Args:
        vectors: (T, *shape). Averaging differences is averaging weights, since all have the same
            theta_0.
        fishers: (T, *shape) >= 0, the diagonal Fisher information of each task at its own
            fine-tuned weights.
        weights: (T,) >= 0, the l_t; default: equal. The authors' code divides each weight by its
            Fisher's norm over the whole vector, and searches the weights on validation data.
            Neither is done here.

    Raises ValueError for other shapes, and for negative or not finite values.
    """
    import torch

    from raytvb.maths.row_sums import sum_rows
    from raytvb.maths.thresholds import check_vectors

    check_vectors(vectors)
    scales = torch.ones(len(vectors)) if weights is None else weights
    _check_inputs(vectors, fishers, scales)
    lambdas = scales.double().tolist()
    rows = list(zip(vectors, fishers, lambdas, strict=True))
    information = sum_rows((f.double() * scale for _, f, scale in rows), vectors)
    total = sum_rows((v.double() * (f.double() * scale) for v, f, scale in rows), vectors)
    average = sum_rows((v.double() * scale for v, _, scale in rows), vectors) / sum(lambdas)
    return torch.where(information > 0, total / information, average).float()


def _check_inputs(vectors: Tensor, fishers: Tensor, weights: Tensor) -> None:
    """Raise ValueError for inputs that `fisher` cannot use."""
    same = fishers.shape == vectors.shape
    if not same or not fishers.isfinite().all() or (fishers < 0).any():
        raise ValueError(
            f"the Fishers must be finite, >= 0 and {tuple(vectors.shape)} like the vectors"
        )
    one_each = weights.shape == (len(vectors),)
    if not one_each or not weights.isfinite().all() or (weights < 0).any() or not weights.any():
        raise ValueError(f"expected {len(vectors)} finite weights >= 0, not all 0")
