"""Merges as coefficients: adding, negating and analogies of tasks cost nothing until their result
is written.

theta_new = theta_0 + alpha * sum_t x_t tau_t with a weight x_t for each task. From a basis, tau_t ~
S w_t, so that the same merge is alpha * S (W x): M numbers. Sources: Ilharco et al., arXiv
2212.04089 (task arithmetic); Zeng et al., arXiv 2502.01015 (bases).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def analogy(a: str, b: str, c: str) -> dict[str, float]:
    """ "a is to b as c is to …": a - b + c as weights by task."""
    return total({a: 1.0}, {b: -1.0}, {c: 1.0})


def total(*parts: Mapping[str, float]) -> dict[str, float]:
    """Sum of several weights by task, in the order in which tasks are first named."""
    found: dict[str, float] = {}
    for part in parts:
        for task, weight in part.items():
            found[task] = found.get(task, 0.0) + weight
    return found


def vector_of(tasks: Sequence[str], weights: Mapping[str, float]) -> Tensor:
    """x (T,) float64 of weights by task. ValueError that lists the tasks which are not there."""
    unknown = [t for t in weights if t not in tasks]
    if unknown:
        raise ValueError(f"no task vector of {', '.join(unknown)}; there are {', '.join(tasks)}")
    return torch.tensor([weights.get(t, 0.0) for t in tasks], dtype=torch.float64)


def decoded(W: Tensor, x: Tensor) -> Tensor:
    """Weights (M,) of the basis vectors for the weights x (T,) of the tasks: W x, W (M, T).

    With x = 1 it is the projection of the sum of all task vectors onto the span of the basis,
    however that was chosen.
    """
    return W.double() @ x.double()


def summed(size: int) -> Tensor:
    """Weights (M,) of the authors' merge, the plain sum of the basis vectors: meaningful for convex
    bases only.
    """
    return torch.ones(size, dtype=torch.float64)


def length_ratios(gram: Tensor, A: Tensor) -> Tensor:
    """Length of each task vector over that of what stands for it, V A[:, t]: (T,) float64, 1 where
    that is zero.

    A basis shortens the vectors that it reconstructs, some more than others; times this ratio they
    have their own lengths again, which adds and subsets better although the reconstruction error is
    larger.
    """
    own, found = gram.double().diagonal(), (A * (gram.double() @ A)).sum(dim=0)
    tiny = torch.finfo(torch.float64).tiny
    return torch.where(found > 1e-12 * own.max(), (own / found.clamp(min=tiny)).sqrt(), 1.0)
