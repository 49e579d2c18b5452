"""Additions of task vectors as coefficients: adding, negating and analogies of tasks.

theta_new = theta_0 + alpha * sum_t x_t tau_t with a weight x_t for each task. With a basis,
tau_t ~ S w_t, so the same addition is alpha * S (W x), and the M numbers W x describe it. No
parameter is touched before the result is written.

Sources: Ilharco et al., arXiv 2212.04089 (task arithmetic); Zeng et al., arXiv 2502.01015 (bases).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def vector_of(tasks: Sequence[str], weights: Mapping[str, float]) -> Tensor:
    """Weights by task as x (T,) float64, in the order of `tasks`, 0 for those without a weight.

    Raises a ValueError that lists the tasks with a weight that are not in `tasks`.
    """
    unknown = [t for t in weights if t not in tasks]
    if unknown:
        raise ValueError(f"no task vector of {', '.join(unknown)}; there are {', '.join(tasks)}")
    return torch.tensor([weights.get(t, 0.0) for t in tasks], dtype=torch.float64)


def decoded(W: Tensor, x: Tensor) -> Tensor:
    """Weights (M,) of the basis vectors for the weights x (T,) of the tasks: W x with W (M, T).

    With all x = 1 the result is the projection of the sum of all task vectors onto the span of the
    basis. It depends only on this span, not on the choice of basis vectors in it.
    """
    return W.double() @ x.double()


def summed(size: int) -> Tensor:
    """Weights (M,) of the authors' merge, the plain sum of the basis vectors: meaningful for convex
    bases only.
    """
    return torch.ones(size, dtype=torch.float64)


def length_ratios(gram: Tensor, A: Tensor) -> Tensor:
    """Length of each task vector over the length of its reconstruction V A[:, t]: (T,) float64.

    The ratio is 1 where the reconstruction is zero. A basis shortens the vectors that it
    reconstructs, some more than others. Multiplied by this ratio, the reconstructions have the
    lengths of the task vectors again. Their additions are then more accurate, although the
    reconstruction error is larger.

    gram: (T, T) of the task vectors V. A: (T, T), B W for a basis.
    """
    own = gram.double().diagonal()
    reconstructed = (A * (gram.double() @ A)).sum(dim=0)
    ratio = own / reconstructed.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(reconstructed > 1e-12 * own.max(), ratio.sqrt(), 1.0)
