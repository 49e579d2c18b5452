"""Merge methods of the literature, one parameter at a time: T task vectors in, the merged
difference out.

A method takes the T differences of one parameter to its pretrained weights, (T, *shape) float32 or
bf16, and gives (*shape) float32: theta_new = theta_0 + alpha * merged, with alpha the caller's. So
a whole model is merged with T times one parameter in memory; beside its input a method holds a few
tensors of one parameter's size, in float32 or float64. `MERGE` names the methods. `PREPARE` names
their parts that give (T, *shape) again, for task vectors before a basis is made of them, or for
vectors that were decoded from one.

What a method needs beyond one parameter it gets as a keyword without a default: `ties` the
thresholds of whole vectors (`global_thresholds` streams them, exactly and in bounded memory),
`dare` a generator, `fisher` the diagonal Fishers. All others see their parameter only. Values are
taken to be finite, which only `Thresholds` checks. Names of parameters are unknown here: that a
method averages some of them by name (text_projection in TSV-M and Iso-C) is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from raytvb.maths.thresholds import check_vectors
from raytvb.maths.trimming import dropped_rows, sparsified_rows, trimmed_rows


def _sum(rows: Iterable[Tensor], like: Tensor) -> Tensor:
    """Sum of rows of the shape of like[0], in float64 and one after the other."""
    out = torch.zeros(like.shape[1:], dtype=torch.float64, device=like.device)
    for row in rows:
        out += row
    return out


def _multi(vectors: Tensor, merged: Tensor | None) -> Tensor:
    """The multi-task vector (*shape) in float64."""
    if merged is not None and merged.shape != check_vectors(vectors).shape[1:]:
        raise ValueError(
            f"a merged vector of shape {tuple(merged.shape)} for {tuple(vectors.shape)} vectors"
        )
    return _sum(check_vectors(vectors), vectors) if merged is None else merged.double()


def _tall_masks(vectors: Tensor, strength: float | Tensor, multi: Tensor) -> Iterator[Tensor]:
    strengths = torch.as_tensor(strength, dtype=torch.float64)
    if strengths.shape not in ((), (len(vectors),)) or not (strengths >= 0).all():
        raise ValueError(f"strength must be one number >= 0, or {len(vectors)} of them")
    for row, each in zip(vectors, strengths.expand(len(vectors)).tolist(), strict=True):
        yield row.double().abs() > each * (multi - row.double()).abs()


def task_sum(vectors: Tensor) -> Tensor:
    """Task arithmetic (Ilharco et al., arXiv 2212.04089): sum_t tau_t. Accumulated in float64."""
    return _sum(check_vectors(vectors), vectors).float()


def task_mean(vectors: Tensor) -> Tensor:
    """Uniform averaging of the fine-tuned weights (Wortsman et al., arXiv 2203.05482): sum_t tau_t
    / T.
    """
    return (_sum(check_vectors(vectors), vectors) / len(vectors)).float()


def ties(vectors: Tensor, *, thresholds: Tensor) -> Tensor:
    """TIES (Yadav et al., arXiv 2306.01708, algorithm 1): trim, elect signs, average what agrees.

    With t_t the `trimmed` vectors and s = sgn(sum_t t_t): the mean over {t : sgn(t_t) = s} of t_t,
    entry by entry. thresholds (T,): from `global_thresholds`; the paper's default density is 0.2,
    its alpha 1. An entry whose trimmed values cancel exactly has no sign and becomes 0, as in the
    paper's formula; the authors' code gives it the sign that prevails over the whole vector. Sums
    are in float64.
    """
    elected = _sum(trimmed_rows(vectors, thresholds), vectors).sign()
    total, agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
    for row in trimmed_rows(vectors, thresholds):
        agrees = row.sign() == elected
        total += torch.where(agrees, row, 0.0)
        agreeing += agrees
    return (total / agreeing.clamp(min=1)).float()


def dare(vectors: Tensor, *, rate: float = 0.9, generator: torch.Generator) -> Tensor:
    """DARE with task arithmetic (Yu et al., arXiv 2311.03099): the sum of the `dropped` vectors."""
    return _sum(dropped_rows(vectors, rate, generator), vectors).float()


def breadcrumbs(vectors: Tensor, *, beta: float = 0.85, gamma: float = 0.994) -> Tensor:
    """Model Breadcrumbs (Davari & Belilovsky, arXiv 2312.06795): the sum of the `sparsified`
    vectors.
    """
    return _sum(sparsified_rows(vectors, beta, gamma), vectors).float()


def consensus(
    vectors: Tensor, *, least: int = 2, strength: float | Tensor = 0.4, merged: Tensor | None = None
) -> Tensor:
    """Consensus merging (Wang et al., arXiv 2405.07813): the merged vector where `least` TALL masks
    agree.

    tau_merged * [sum_t m_t >= least], with TALL masks m_t = |tau_t| > lambda_t |tau_merged -
    tau_t|. least = 2 removes what no task uses (catastrophic) and what one uses (selfish); least >
    T removes everything, so one task alone needs least = 1.
    Simplified: lambda is given, not picked per task on validation data (`strength` may be (T,)).
    """
    multi = _multi(vectors, merged)
    votes = torch.zeros(multi.shape, dtype=torch.int64, device=vectors.device)
    for mask in _tall_masks(vectors, strength, multi):
        votes += mask
    return torch.where(votes >= least, multi, 0.0).float()


def tall(
    vectors: Tensor, *, strength: float | Tensor = 0.4, merged: Tensor | None = None
) -> Tensor:
    """The merged vector where any TALL mask has it: `consensus` with least = 1, which removes
    catastrophic weights.
    """
    return consensus(vectors, least=1, strength=strength, merged=merged)


def _orthonormal(factors: Tensor) -> Tensor:
    """The nearest partial isometry to factors (m, K): P Q' of the SVD P D Q', without directions of
    no length.
    """
    P, lengths, Q = torch.linalg.svd(factors, full_matrices=False)
    return (P * (lengths > _resolution(factors) * lengths.max())) @ Q


def _resolution(matrix: Tensor) -> float:
    """Singular values below this part of the largest are rounding, as in
    `torch.linalg.matrix_rank`.
    """
    return max(matrix.shape) * torch.finfo(torch.float32).eps


def tsv_m(vectors: Tensor) -> Tensor:
    """Task singular vectors, TSV-Merge (Gargiulo et al., arXiv 2412.00081, algorithm 1); matrices
    only, else the mean.

    Of each (m, n) vector the k = max(1, floor(min(m, n) / T)) leading singular triplets are kept;
    with U (m, Tk) and V (n, Tk) side by side and S (Tk, Tk) diagonal, the result is U' S V'^T with
    U', V' the orthonormal matrices that are nearest to U and V (Procrustes). The paper's alpha is
    1.

    Simplified: vectors of other than two dimensions (biases, convolutions) are averaged, as in the
    authors' code. Different where theirs depends on arbitrary directions: triplets of singular
    value 0 are left out (all-zero or low-rank vectors), directions that U or V has twice count once
    (equal vectors), and k is at least 1 where they would have 0 for T > min(m, n). The SVDs are in
    float32. Time: T SVDs of m x n and two of m x Tk and n x Tk.
    """
    if check_vectors(vectors).ndim != 3:
        return task_mean(vectors)
    rank = max(1, min(vectors.shape[1:]) // len(vectors))
    parts = []
    for row in vectors:
        U, s, Vh = torch.linalg.svd(row.float(), full_matrices=False)
        used = min(rank, int((s > _resolution(row) * s.max()).sum()))
        parts.append((U[:, :used], s[:used], Vh[:used].T))
    U, s, V = (torch.cat(p, dim=-1) for p in zip(*parts, strict=True))
    if len(s) == 0:
        return torch.zeros(vectors.shape[1:], device=vectors.device)
    return (_orthonormal(U) * s) @ _orthonormal(V).T


def iso_c(vectors: Tensor) -> Tensor:
    """Iso-C (Marczak et al., arXiv 2502.04959, sec. 4): the task sum with all singular values
    equal; else the mean.

    With sum_t tau_t = U S V^T of shape (m, n) the result is mean(diag S) U V^T, all min(m, n)
    directions alike: where the sum has a lower rank, the others are arbitrary, as in the authors'
    code. Vectors of other than two dimensions are averaged, as there. The SVD is in float32.
    Iso-CTS, with task-specific directions, is not here.
    """
    if check_vectors(vectors).ndim != 3:
        return task_mean(vectors)
    U, s, Vh = torch.linalg.svd(task_sum(vectors), full_matrices=False)
    return s.mean() * (U @ Vh)


def fisher(vectors: Tensor, *, fishers: Tensor, weights: Tensor | None = None) -> Tensor:
    """Fisher-weighted averaging (Matena & Raffel, arXiv 2111.09832): sum_t l_t F_t tau_t / sum_t
    l_t F_t.

    Args:
        vectors: (T, *shape). Averaging differences is averaging weights, since all have the same
            theta_0.
        fishers: (T, *shape) >= 0, the diagonal Fisher information of each task at its own
            fine-tuned weights.
        weights: (T,) >= 0, the l_t; default: equal. The authors' code divides each by its Fisher's
            norm over the whole vector, which is not done here, and searches them on validation
            data.
    An entry where all l_t F_t are 0 is the average with weights l_t; the authors' code takes a
    floor of 1e-6 for the first model's Fisher instead. Sums are in float64. ValueError for other
    shapes, negative or not finite values.
    """
    if (
        fishers.shape != check_vectors(vectors).shape
        or not torch.isfinite(fishers).all()
        or (fishers < 0).any()
    ):
        raise ValueError(
            f"the Fishers must be finite, >= 0 and {tuple(vectors.shape)}, as the vectors"
        )
    scales = torch.ones(len(vectors)) if weights is None else weights
    if (
        scales.shape != (len(vectors),)
        or not torch.isfinite(scales).all()
        or (scales < 0).any()
        or not scales.any()
    ):
        raise ValueError(f"expected {len(vectors)} finite weights >= 0, not all 0")
    lambdas = scales.double().tolist()
    rows = list(zip(vectors, fishers, lambdas, strict=True))
    information = _sum((f.double() * each for _, f, each in rows), vectors)
    total = _sum((v.double() * (f.double() * each) for v, f, each in rows), vectors)
    plain = _sum((v.double() * each for v, _, each in rows), vectors) / sum(lambdas)
    return torch.where(information > 0, total / information, plain).float()


MERGE: Mapping[str, Callable[..., Tensor]] = {
    "sum": task_sum,
    "mean": task_mean,
    "ties": ties,
    "dare": dare,
    "breadcrumbs": breadcrumbs,
    "tall": tall,
    "consensus": consensus,
    "tsv-m": tsv_m,
    "iso-c": iso_c,
    "fisher": fisher,
}


MATRIX_METHODS = ("tsv-m", "iso-c")


UNSCALED = (
    "mean",
    "ties",
    "tsv-m",
    "iso-c",
)  # made for a coefficient of 1; the others are as large as a sum
