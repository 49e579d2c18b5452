"""Steps of merge methods that turn task vectors into task vectors: trimmed, dropped, sparsified.

`PREPARE` names these steps, for bases that are made of such vectors (`basis: {prepare: …}` in an
experiment file). The merge methods sum what the functions `…_rows` yield.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import floor

import torch
from torch import Tensor

from raytvb.maths.thresholds import check_vectors


def trimmed_rows(vectors: Tensor, thresholds: Tensor) -> Iterator[Tensor]:
    """The vectors of `trimmed` one by one, (*shape) float32; ValueError for another T."""
    if thresholds.shape != check_vectors(vectors).shape[:1]:
        raise ValueError(
            f"{len(vectors)} vectors need as many thresholds, not {tuple(thresholds.shape)}"
        )
    for row, threshold in zip(vectors, thresholds, strict=True):
        row = row.float()
        yield torch.where(row.abs() >= threshold, row, 0.0)


def trimmed(vectors: Tensor, *, thresholds: Tensor) -> Tensor:
    """Entries of small magnitude set to zero, the first step of TIES: (T, *shape) float32.

    thresholds (T,): the least magnitude that stays. It comes from `global_thresholds`, which takes
    the density, since the paper trims over the whole vector. Entries equal to the threshold stay,
    so with ties more than k entries stay. The authors' code keeps k + 1.
    """
    return torch.stack(list(trimmed_rows(vectors, thresholds)))


def dropped_rows(vectors: Tensor, rate: float, generator: torch.Generator) -> Iterator[Tensor]:
    """The vectors of `dropped` one by one, (*shape) float32; ValueError for a rate outside
    [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"the drop rate must be in [0, 1), not {rate}")
    for row in check_vectors(vectors):
        draws = torch.rand(row.shape, generator=generator, device=generator.device)
        yield torch.where(draws.to(row.device) >= rate, row.float() / (1.0 - rate), 0.0)


def dropped(vectors: Tensor, *, rate: float = 0.9, generator: torch.Generator) -> Tensor:
    """DARE (Yu et al., arXiv 2311.03099): (1 - m) * tau / (1 - p) with m ~ Bernoulli(p).

    Returns (T, *shape) float32. Each entry of each vector is dropped independently with probability
    p = `rate`. The others are scaled up, so that the expectation is the vector. The paper drops
    90 % and more without loss; for merging it searches p.

    The draws are the generator's next ones, vector after vector. So parameters must come in a fixed
    order, or each parameter needs its own generator.
    """
    return torch.stack(list(dropped_rows(vectors, rate, generator)))


def sparsified_rows(vectors: Tensor, beta: float, gamma: float) -> Iterator[Tensor]:
    """The vectors of `sparsified` one by one, (*shape) float32; ValueError unless
    0 <= beta <= gamma <= 1.
    """
    if not 0.0 <= beta <= gamma <= 1.0:
        raise ValueError(f"expected 0 <= beta <= gamma <= 1, not beta {beta} and gamma {gamma}")
    for row in check_vectors(vectors):
        row = row.float()
        sizes = row.abs().reshape(-1)
        first, last = floor(beta * len(sizes)) + 1, len(sizes) - floor((1.0 - gamma) * len(sizes))
        if first > last:
            yield torch.zeros_like(row)
            continue
        inside = row.abs() >= sizes.kthvalue(first).values
        yield torch.where(inside & (row.abs() <= sizes.kthvalue(last).values), row, 0.0)


def sparsified(vectors: Tensor, *, beta: float = 0.85, gamma: float = 0.994) -> Tensor:
    """Model Breadcrumbs (Davari & Belilovsky, arXiv 2312.06795): both tails of a layer become zero.

    Returns (T, *shape) float32. Of the n magnitudes of a vector's parameter the floor(beta n)
    smallest are dropped as negligible, and the floor((1 - gamma) n) largest as outliers. An entry
    as large as the smallest or largest one that stays is kept too, so constant tensors are
    untouched. Zeros count, so for sparse vectors beta acts only beyond their share of zeros.

    Entries are ranked within each tensor, since the paper says layer-wise. The authors' code ranks
    along the last dimension of a tensor, row by row. The defaults are where the authors' search
    starts (15 % kept, the top 0.6 % removed); the paper tunes both, and alpha.
    """
    return torch.stack(list(sparsified_rows(vectors, beta, gamma)))


PREPARE: Mapping[str, Callable[..., Tensor]] = {
    "trimmed": trimmed,
    "dropped": dropped,
    "sparsified": sparsified,
}
