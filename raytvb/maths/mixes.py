"""Additions of task vectors as coefficients: adding, negating and analogies of tasks.

theta_new = theta_0 + alpha * sum_t x_t tau_t with a weight x_t for each task. From a basis, tau_t ~
S w_t, so that the same addition is alpha * S (W x): M numbers. No parameter is touched before the
result is written. Sources: Ilharco et al., arXiv
2212.04089 (task arithmetic); Zeng et al., arXiv 2502.01015 (bases).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def analogy(a: str, b: str, c: str) -> dict[str, float]:
    """Weights by task of a - b + c: what is to c as a is to b."""
    return total({a: 1.0}, {b: -1.0}, {c: 1.0})


def total(*parts: Mapping[str, float]) -> dict[str, float]:
    """Sum of several weights by task, in the order in which tasks are first named."""
    weights: dict[str, float] = {}
    for part in parts:
        for task, weight in part.items():
            weights[task] = weights.get(task, 0.0) + weight
    return weights


def vector_of(tasks: Sequence[str], weights: Mapping[str, float]) -> Tensor:
    """Weights by task as x (T,) float64, in the order of `tasks`, 0 for those without a weight.

    Raises ValueError that lists the tasks which are not in `tasks`.
    """
    unknown = [t for t in weights if t not in tasks]
    if unknown:
        raise ValueError(f"no task vector of {', '.join(unknown)}; there are {', '.join(tasks)}")
    return torch.tensor([weights.get(t, 0.0) for t in tasks], dtype=torch.float64)


def decoded(W: Tensor, x: Tensor) -> Tensor:
    """Weights (M,) of the basis vectors for the weights x (T,) of the tasks: W x with W (M, T).

    With all x = 1 the result is the projection of the sum of all task vectors onto the span of the
    basis, however the basis was chosen in it.
    """
    return W.double() @ x.double()


def summed(size: int) -> Tensor:
    """Weights (M,) of the authors' merge, the plain sum of the basis vectors: meaningful for convex
    bases only.
    """
    return torch.ones(size, dtype=torch.float64)


def length_ratios(gram: Tensor, A: Tensor) -> Tensor:
    """Length of each task vector over the length of its reconstruction V A[:, t]: (T,) float64.

    It is 1 where the reconstruction is zero. A basis shortens the vectors that it reconstructs,
    some more than others. Times this ratio they have their own lengths again: additions of them
    are more accurate, although the reconstruction error is larger.

    gram: (T, T) of the task vectors V. A: (T, T), B W for a basis.
    """
    own = gram.double().diagonal()
    reconstructed = (A * (gram.double() @ A)).sum(dim=0)
    ratio = own / reconstructed.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(reconstructed > 1e-12 * own.max(), ratio.sqrt(), 1.0)
