"""Merge methods of the literature, one parameter at a time: T task vectors in, the merged difference out.

A method takes the T differences of one parameter to its pretrained weights, (T, *shape) float32 or bf16, and gives
(*shape) float32: theta_new = theta_0 + alpha * merged, with alpha the caller's. So a whole model is merged with T times
one parameter in memory; beside its input a method holds a few tensors of one parameter's size, in float32 or float64.
`MERGE` names the methods. `PREPARE` names their parts that give (T, *shape) again, for task vectors before a basis is
made of them, or for vectors that were decoded from one.

What a method needs beyond one parameter it gets as a keyword without a default: `ties` the thresholds of whole vectors
(`global_thresholds` streams them, exactly and in bounded memory), `dare` a generator, `fisher` the diagonal Fishers.
All others see their parameter only. Values are taken to be finite, which only `Thresholds` checks. Names of parameters
are unknown here: that a method averages some of them by name (text_projection in TSV-M and Iso-C) is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import floor

import torch
from torch import Tensor

from raytvb.talos import kept_count

_NOT_FINITE = 0x7F800000  # bits of infinity in float32; those of NaN are above


def _check(vectors: Tensor) -> Tensor:
    if vectors.ndim == 0 or len(vectors) == 0 or not vectors.is_floating_point():
        raise ValueError(f"expected T >= 1 vectors (T, *shape) of floats, not {tuple(vectors.shape)} {vectors.dtype}")
    return vectors


def _sum(rows: Iterable[Tensor], like: Tensor) -> Tensor:
    """Sum of rows of the shape of like[0], in float64 and one after the other."""
    out = torch.zeros(like.shape[1:], dtype=torch.float64, device=like.device)
    for row in rows:
        out += row
    return out


class Thresholds:
    """The k-th largest magnitude of each of T vectors that pass by one parameter at a time, k = round(density * D).

    Exact. Magnitudes in float32 are ordered as their bits are: the first pass counts the upper 16 bits, the second one
    the lower 16 bits of the entries that share the upper bits of the k-th. In bf16 the lower bits are zero and one pass
    is enough. Memory: at most T * 2 MB for the counts and a few rows of one parameter, independent of D.

        thresholds = Thresholds(0.2)
        while thresholds.values is None:
            for vectors in parameters():
                thresholds.add(vectors)
            thresholds.end_pass()
    """

    def __init__(self, density: float = 0.2) -> None:
        """ValueError for a density outside (0, 1]."""
        kept_count(1, density)
        self.density = density
        self.values: Tensor | None = None  # (T,) float32, once the last pass has ended
        self._counts: Tensor | None = None  # (T, 2^15 or 2^16) int64, of the current pass
        self._upper: Tensor | None = None  # (T,) int64, after the first pass
        self._rank = self._inside = torch.empty(0)  # (T,): of the k-th within its bin of the first pass; the bin's size
        self._halves = True  # only bf16 has been seen

    def add(self, vectors: Tensor) -> None:
        """Count one parameter, (T, *shape) float32 or bf16. ValueError for another T, and for NaN and infinity."""
        bins = 2**15 if self._upper is None else 2**16
        if self._counts is None:
            self._counts = torch.zeros(len(_check(vectors)), bins, dtype=torch.int64, device=vectors.device)
        if len(vectors) != len(self._counts):
            raise ValueError(f"a parameter of {len(vectors)} vectors after one of {len(self._counts)}")
        self._halves &= vectors.dtype == torch.bfloat16
        for t, row in enumerate(vectors):
            bits = row.float().abs().reshape(-1).view(torch.int32)
            if (bits >= _NOT_FINITE).any():
                raise ValueError(f"vector {t} has NaN or infinite values")
            bits = bits >> 16 if self._upper is None else bits[bits >> 16 == self._upper[t]] & 0xFFFF
            self._counts[t] += torch.bincount(bits, minlength=bins)

    def end_pass(self) -> None:
        """After all parameters. ValueError where there were none, or not those of the first pass."""
        counts, self._counts = self._counts, None
        if counts is None or not counts.any():
            raise ValueError("no vectors passed: both passes need all parameters")
        if self._upper is None:
            totals = counts.sum(1)
            ranks = [kept_count(int(total), self.density) for total in totals]
            self._upper, self._rank, self._inside = _locate(counts, torch.tensor(ranks, device=counts.device))
            if self._halves:
                self.values = (self._upper << 16).int().view(torch.float32)
        else:
            if not torch.equal(counts.sum(1), self._inside):
                raise ValueError("the second pass had other values than the first")
            lower = _locate(counts, self._rank)[0]
            self.values = (self._upper << 16 | lower).int().view(torch.float32)


def _locate(counts: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bin of the rank-th largest entry (1 is the largest), its rank within the bin, and the bin's size; each (T,)."""
    reached = counts.flip(1).cumsum(1).flip(1)  # entries in this bin or above
    found = (reached >= ranks[:, None]).sum(1) - 1
    inside = counts.gather(1, found[:, None])[:, 0]
    above = reached.gather(1, found[:, None])[:, 0] - inside
    return found, ranks - above, inside


def global_thresholds(parameters: Callable[[], Iterable[Tensor]], density: float = 0.2) -> Tensor:
    """`Thresholds` (T,) float32 of vectors whose parameters (T, *shape) `parameters` gives anew for each pass."""
    thresholds = Thresholds(density)
    while thresholds.values is None:
        for vectors in parameters():
            thresholds.add(vectors)
        thresholds.end_pass()
    return thresholds.values


def _trimmed(vectors: Tensor, thresholds: Tensor) -> Iterator[Tensor]:
    if thresholds.shape != _check(vectors).shape[:1]:
        raise ValueError(f"{len(vectors)} vectors need as many thresholds, not {tuple(thresholds.shape)}")
    for row, threshold in zip(vectors, thresholds, strict=True):
        row = row.float()
        yield torch.where(row.abs() >= threshold, row, 0.0)


def trimmed(vectors: Tensor, *, thresholds: Tensor) -> Tensor:
    """Entries of small magnitude set to zero, the first step of TIES: (T, *shape) float32.

    thresholds (T,): the least magnitude that stays, from `global_thresholds` (which has the density), since the paper
    trims over the whole vector. Entries equal to it stay, so with ties more than k. The authors' code keeps k + 1.
    """
    return torch.stack(list(_trimmed(vectors, thresholds)))


def _dropped(vectors: Tensor, rate: float, generator: torch.Generator) -> Iterator[Tensor]:
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"the drop rate must be in [0, 1), not {rate}")
    for row in _check(vectors):
        draws = torch.rand(row.shape, generator=generator, device=generator.device)
        yield torch.where(draws.to(row.device) >= rate, row.float() / (1.0 - rate), 0.0)


def dropped(vectors: Tensor, *, rate: float = 0.9, generator: torch.Generator) -> Tensor:
    """DARE (Yu et al., arXiv 2311.03099): (1 - m) * tau / (1 - p) with m ~ Bernoulli(p); (T, *shape) float32.

    Each entry of each vector is dropped by itself with p = `rate` and the others are scaled up, so that the expectation
    is the vector. The paper drops 90 % and more without loss; for merging it searches p. The draws are the generator's
    next ones, vector after vector: parameters must come in a fixed order, or each with its own generator.
    """
    return torch.stack(list(_dropped(vectors, rate, generator)))


def _sparsified(vectors: Tensor, beta: float, gamma: float) -> Iterator[Tensor]:
    if not 0.0 <= beta <= gamma <= 1.0:
        raise ValueError(f"expected 0 <= beta <= gamma <= 1, not beta {beta} and gamma {gamma}")
    for row in _check(vectors):
        row = row.float()
        sizes = row.abs().reshape(-1)
        first, last = floor(beta * len(sizes)) + 1, len(sizes) - floor((1.0 - gamma) * len(sizes))
        if first > last:
            yield torch.zeros_like(row)
            continue
        inside = row.abs() >= sizes.kthvalue(first).values
        yield torch.where(inside & (row.abs() <= sizes.kthvalue(last).values), row, 0.0)


def sparsified(vectors: Tensor, *, beta: float = 0.85, gamma: float = 0.994) -> Tensor:
    """Model Breadcrumbs' masks (Davari & Belilovsky, arXiv 2312.06795): both tails of a layer are set to zero.

    Of the n magnitudes of a vector's parameter the floor(beta n) smallest are dropped as negligible and the
    floor((1 - gamma) n) largest as outliers; (T, *shape) float32. Entries equal to the last one that stays stay too,
    so constant tensors are untouched. Zeros count, so for sparse vectors beta acts only beyond their share of zeros.
    Per tensor, as the paper says layer-wise; the authors' code ranks along the last dimension of a tensor, row by row.
    The defaults are where their search starts (15 % kept, the top 0.6 % removed); the paper tunes both, and alpha.
    """
    return torch.stack(list(_sparsified(vectors, beta, gamma)))


def tall_masks(vectors: Tensor, *, strength: float | Tensor = 0.4, merged: Tensor | None = None) -> Tensor:
    """TALL masks (Wang et al., arXiv 2405.07813): m_t = |tau_t| > lambda_t |tau_merged - tau_t|.

    Args:
        vectors: (T, *shape).
        strength: lambda, one for all tasks or (T,). The paper picks it per task out of 0.2, 0.3, .. 0.6 on validation
            data, so there is no default of theirs; 0.4 is the middle.
        merged: (*shape), the multi-task vector; default: the sum of the vectors (in float64). The paper also has TIES.
    Returns bool (T, *shape): the entries of the merged vector that a task uses; none that no task changed. ValueError
    for negative strengths or another number of them.
    """
    return torch.stack(list(_tall_masks(vectors, strength, _multi(vectors, merged))))


def _multi(vectors: Tensor, merged: Tensor | None) -> Tensor:
    """The multi-task vector (*shape) in float64."""
    if merged is not None and merged.shape != _check(vectors).shape[1:]:
        raise ValueError(f"a merged vector of shape {tuple(merged.shape)} for {tuple(vectors.shape)} vectors")
    return _sum(_check(vectors), vectors) if merged is None else merged.double()


def _tall_masks(vectors: Tensor, strength: float | Tensor, multi: Tensor) -> Iterator[Tensor]:
    strengths = torch.as_tensor(strength, dtype=torch.float64)
    if strengths.shape not in ((), (len(vectors),)) or not (strengths >= 0).all():
        raise ValueError(f"strength must be one number >= 0, or {len(vectors)} of them")
    for row, each in zip(vectors, strengths.expand(len(vectors)).tolist(), strict=True):
        yield row.double().abs() > each * (multi - row.double()).abs()


def localized(vectors: Tensor, *, strength: float | Tensor = 0.4, merged: Tensor | None = None) -> Tensor:
    """Each task's vector as TALL masks recover it, the paper's compression: m_t * tau_merged, (T, *shape) float32."""
    multi = _multi(vectors, merged)
    return torch.stack([(mask * multi).float() for mask in _tall_masks(vectors, strength, multi)])


def task_sum(vectors: Tensor) -> Tensor:
    """Task arithmetic (Ilharco et al., arXiv 2212.04089): sum_t tau_t. Accumulated in float64."""
    return _sum(_check(vectors), vectors).float()


def task_mean(vectors: Tensor) -> Tensor:
    """Uniform averaging of the fine-tuned weights (Wortsman et al., arXiv 2203.05482): sum_t tau_t / T."""
    return (_sum(_check(vectors), vectors) / len(vectors)).float()


def ties(vectors: Tensor, *, thresholds: Tensor) -> Tensor:
    """TIES (Yadav et al., arXiv 2306.01708, algorithm 1): trim, elect signs, average what agrees.

    With t_t the `trimmed` vectors and s = sgn(sum_t t_t): the mean over {t : sgn(t_t) = s} of t_t, entry by entry.
    thresholds (T,): from `global_thresholds`; the paper's default density is 0.2, its alpha 1. An entry whose trimmed
    values cancel exactly has no sign and becomes 0, as in the paper's formula; the authors' code gives it the sign that
    prevails over the whole vector. Sums are in float64.
    """
    elected = _sum(_trimmed(vectors, thresholds), vectors).sign()
    total, agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
    for row in _trimmed(vectors, thresholds):
        agrees = row.sign() == elected
        total += torch.where(agrees, row, 0.0)
        agreeing += agrees
    return (total / agreeing.clamp(min=1)).float()


def dare(vectors: Tensor, *, rate: float = 0.9, generator: torch.Generator) -> Tensor:
    """DARE with task arithmetic (Yu et al., arXiv 2311.03099): the sum of the `dropped` vectors."""
    return _sum(_dropped(vectors, rate, generator), vectors).float()


def breadcrumbs(vectors: Tensor, *, beta: float = 0.85, gamma: float = 0.994) -> Tensor:
    """Model Breadcrumbs (Davari & Belilovsky, arXiv 2312.06795): the sum of the `sparsified` vectors."""
    return _sum(_sparsified(vectors, beta, gamma), vectors).float()


def consensus(vectors: Tensor, *, least: int = 2, strength: float | Tensor = 0.4,
              merged: Tensor | None = None) -> Tensor:
    """Consensus merging (Wang et al., arXiv 2405.07813): the merged vector where `least` TALL masks agree.

    tau_merged * [sum_t m_t >= least], with the masks m_t of `tall_masks`. least = 2 removes what no task uses
    (catastrophic) and what one uses (selfish); least > T removes everything, so one task alone needs least = 1.
    Simplified: lambda is given, not picked per task on validation data (`strength` may be (T,)).
    """
    multi = _multi(vectors, merged)
    votes = torch.zeros(multi.shape, dtype=torch.int64, device=vectors.device)
    for mask in _tall_masks(vectors, strength, multi):
        votes += mask
    return torch.where(votes >= least, multi, 0.0).float()


def tall(vectors: Tensor, *, strength: float | Tensor = 0.4, merged: Tensor | None = None) -> Tensor:
    """The merged vector where any TALL mask has it: `consensus` with least = 1, which removes catastrophic weights.

    TALL masks are made for one vector per task, which is `localized`; this is the one vector that holds all of those.
    """
    return consensus(vectors, least=1, strength=strength, merged=merged)


def _orthonormal(factors: Tensor) -> Tensor:
    """The nearest partial isometry to factors (m, K): P Q' of the SVD P D Q', without directions of no length."""
    P, lengths, Q = torch.linalg.svd(factors, full_matrices=False)
    return (P * (lengths > _resolution(factors) * lengths.max())) @ Q


def _resolution(matrix: Tensor) -> float:
    """Singular values below this part of the largest are rounding, as in `torch.linalg.matrix_rank`."""
    return max(matrix.shape) * torch.finfo(torch.float32).eps


def tsv_m(vectors: Tensor) -> Tensor:
    """Task singular vectors, TSV-Merge (Gargiulo et al., arXiv 2412.00081, algorithm 1); matrices only, else the mean.

    Of each (m, n) vector the k = max(1, floor(min(m, n) / T)) leading singular triplets are kept; with U (m, Tk) and
    V (n, Tk) side by side and S (Tk, Tk) diagonal, the result is U' S V'^T with U', V' the orthonormal matrices that
    are nearest to U and V (Procrustes). The paper's alpha is 1.

    Simplified: vectors of other than two dimensions (biases, convolutions) are averaged, as in the authors' code.
    Different where theirs depends on arbitrary directions: triplets of singular value 0 are left out (all-zero or
    low-rank vectors), directions that U or V has twice count once (equal vectors), and k is at least 1 where they would
    have 0 for T > min(m, n). The SVDs are in float32. Time: T SVDs of m x n and two of m x Tk and n x Tk.
    """
    if _check(vectors).ndim != 3:
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
    """Iso-C (Marczak et al., arXiv 2502.04959, sec. 4): the task sum with all singular values equal; else the mean.

    With sum_t tau_t = U S V^T of shape (m, n) the result is mean(diag S) U V^T, all min(m, n) directions alike: where
    the sum has a lower rank, the others are arbitrary, as in the authors' code. Vectors of other than two dimensions
    are averaged, as there. The SVD is in float32. Iso-CTS, with task-specific directions, is not here.
    """
    if _check(vectors).ndim != 3:
        return task_mean(vectors)
    U, s, Vh = torch.linalg.svd(task_sum(vectors), full_matrices=False)
    return s.mean() * (U @ Vh)


def fisher(vectors: Tensor, *, fishers: Tensor, weights: Tensor | None = None) -> Tensor:
    """Fisher-weighted averaging (Matena & Raffel, arXiv 2111.09832): sum_t l_t F_t tau_t / sum_t l_t F_t.

    Args:
        vectors: (T, *shape). Averaging differences is averaging weights, since all have the same theta_0.
        fishers: (T, *shape) >= 0, the diagonal Fisher information of each task at its own fine-tuned weights.
        weights: (T,) >= 0, the l_t; default: equal. The authors' code divides each by its Fisher's norm over the whole
            vector, which is not done here, and searches them on validation data.
    An entry where all l_t F_t are 0 is the average with weights l_t; the authors' code takes a floor of 1e-6 for the
    first model's Fisher instead. Sums are in float64. ValueError for other shapes, negative or not finite values.
    """
    if fishers.shape != _check(vectors).shape or not torch.isfinite(fishers).all() or (fishers < 0).any():
        raise ValueError(f"the Fishers must be finite, >= 0 and {tuple(vectors.shape)}, as the vectors")
    scales = torch.ones(len(vectors)) if weights is None else weights
    if scales.shape != (len(vectors),) or not torch.isfinite(scales).all() or (scales < 0).any() or not scales.any():
        raise ValueError(f"expected {len(vectors)} finite weights >= 0, not all 0")
    lambdas = scales.double().tolist()
    rows = list(zip(vectors, fishers, lambdas, strict=True))
    information = _sum((f.double() * each for _, f, each in rows), vectors)
    total = _sum((v.double() * (f.double() * each) for v, f, each in rows), vectors)
    plain = _sum((v.double() * each for v, _, each in rows), vectors) / sum(lambdas)
    return torch.where(information > 0, total / information, plain).float()


PREPARE: Mapping[str, Callable[..., Tensor]] = {"trimmed": trimmed, "dropped": dropped, "sparsified": sparsified,
                                                "localized": localized}
MERGE: Mapping[str, Callable[..., Tensor]] = {
    "sum": task_sum, "mean": task_mean, "ties": ties, "dare": dare, "breadcrumbs": breadcrumbs, "tall": tall,
    "consensus": consensus, "tsv-m": tsv_m, "iso-c": iso_c, "fisher": fisher}
