"""TSV-Merge: task singular vectors made orthogonal to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.merge_methods.mean import task_mean
from raytvb.maths.merge_registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    "tsv-m",
    summary="TSV-Merge: leading singular vectors of each task, made orthogonal",
    coefficient="one",
    matrices=True,
)
def tsv_m(vectors: Tensor) -> Tensor:
    """Task singular vectors, TSV-Merge (Gargiulo et al., arXiv 2412.00081, algorithm 1).

    Of each (m, n) vector the k = max(1, floor(min(m, n) / T)) leading singular triplets are kept.
    With U (m, Tk) and V (n, Tk) side by side and S (Tk, Tk) diagonal, the result is U' S V'^T;
    U' and V' are the orthonormal matrices nearest to U and V (Procrustes). The paper's alpha is 1.

    Simplified: parameters of other than two dimensions (biases, convolutions) are averaged, as in
    the authors' code.

    This function differs from the authors' code where theirs depends on arbitrary directions.
    Triplets of singular value 0 are left out (all-zero or low-rank vectors). Directions that U or V
    has twice count once (equal vectors). k is at least 1; the authors' k would be 0 for
    T > min(m, n).

    The SVDs are in float32. Time: T SVDs of m x n and two of m x Tk and n x Tk.
    """
    import torch

    from raytvb.maths.isometry import nearest_isometry, rounding_level
    from raytvb.maths.thresholds import check_vectors

    if check_vectors(vectors).ndim != 3:
        return task_mean(vectors)
    rank = max(1, min(vectors.shape[1:]) // len(vectors))
    lefts, values, rights = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    for row in vectors:
        U, s, Vh = torch.linalg.svd(row.float(), full_matrices=False)
        used = min(rank, int((s > rounding_level(row) * s.max()).sum()))
        lefts.append(U[:, :used])
        values.append(s[:used])
        rights.append(Vh[:used].T)
    s = torch.cat(values)
    if len(s) == 0:
        return torch.zeros(vectors.shape[1:], device=vectors.device)
    U, V = torch.cat(lefts, dim=-1), torch.cat(rights, dim=-1)
    return (nearest_isometry(U) * s) @ nearest_isometry(V).T
