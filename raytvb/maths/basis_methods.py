"""The basis methods, by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytvb.maths.gram_factor import GramFactor
from raytvb.maths.simplex import ae, ae_anchored

Method = Callable[[GramFactor, int, torch.Generator], tuple[Tensor, Tensor]]


def ae_adam(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The authors' way, for comparison: joint Adam on (logits of B, W), here on the normalised
    Gram.
    """
    F_RT = vectors.F_RT
    logits_TM = torch.randn(
        F_RT.shape[1], size, dtype=torch.float64, generator=generator
    ).requires_grad_()
    W_MT = (
        torch.randn(size, F_RT.shape[1], dtype=torch.float64, generator=generator) / size
    ).requires_grad_()
    optimizer = torch.optim.Adam([logits_TM, W_MT], lr=0.02)
    with torch.enable_grad():
        for _ in range(2000):
            loss = (F_RT @ logits_TM.softmax(0) @ W_MT - F_RT).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return logits_TM.detach().softmax(0), W_MT.detach()


def svd(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The top M singular directions of V, not centred: the floor itself. B = U_M, W = U_Mᵀ, U
    eigenvectors of G.
    """
    B_TM = vectors.U_TR[:, :size]
    return B_TM, B_TM.T.contiguous()


def pca(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The mean vector and M−1 components of the centred vectors: M stored vectors in all. W = [1ᵀ;
    C ᵀ].
    """
    tasks = len(vectors.G_TT)
    C_TK = vectors.centred[:, : size - 1]
    C_TK = C_TK - C_TK.mean(0)  # already centred, unless the eigenvalue is zero
    ones_T1 = torch.ones(tasks, 1, dtype=torch.float64)
    return torch.cat([ones_T1 / tasks, C_TK], 1), torch.cat([ones_T1, C_TK], 1).T.contiguous()


def kmeans(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Means of the clusters that k-means finds; the columns of F stand in for the vectors (same
    distances).
    """
    from sklearn.cluster import KMeans  # more than a second to import, and only two methods need it
    from sklearn.exceptions import ConvergenceWarning

    model = KMeans(size, n_init=10, random_state=_seed(generator))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # fewer distinct vectors than clusters: handled below
        labels = model.fit_predict(vectors.F_RT.T.numpy())
    return _cluster_means(vectors, labels, size)


def spectral(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Means of the clusters that spectral clustering finds; affinity (1 + cosine) / 2, which is
    never negative.

    Its k-means weighs each vector by its squared norm: the loss does, and the affinity knows no
    norms.
    """
    norm_T = vectors.G_TT.diag().clamp(min=0).sqrt()
    cosine_TT = vectors.G_TT / torch.outer(norm_T, norm_T).clamp(min=1e-300)
    affinity_TT = ((1 + cosine_TT.clamp(-1, 1)) / 2).numpy()
    from sklearn.cluster import KMeans  # as above
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.manifold import spectral_embedding

    seed = _seed(generator)
    embedded_TM = spectral_embedding(
        affinity_TT, n_components=size, drop_first=False, random_state=seed
    )
    model = KMeans(size, n_init=10, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = model.fit_predict(embedded_TM, sample_weight=norm_T.square().numpy())
    return _cluster_means(vectors, labels, size)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31 - 1, (1,), generator=generator))


def _cluster_means(
    vectors: GramFactor, labels: NDArray[np.int32], size: int
) -> tuple[Tensor, Tensor]:
    """B with column m uniform over the tasks labelled m; an empty cluster takes a task from the
    largest one.
    """
    label_T = torch.from_numpy(labels.astype(np.int64))
    for empty in sorted(set(range(size)) - set(label_T.tolist())):
        largest = label_T.bincount(minlength=size).argmax()
        label_T[(label_T == largest).nonzero()[-1]] = empty
    B_TM = torch.nn.functional.one_hot(label_T, size).double()
    B_TM = B_TM / B_TM.sum(0)
    return B_TM, vectors.weights(B_TM)


def greedy(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """M of the vectors themselves: each time the one worst explained by those before
    (column-pivoted Cholesky).
    """
    return _subset(vectors, torch.tensor(vectors.pivots[:size]))


def random_subset(
    vectors: GramFactor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Baseline: M of the vectors, drawn at random."""
    return _subset(vectors, torch.randperm(len(vectors.G_TT), generator=generator)[:size])


def _subset(vectors: GramFactor, index_M: Tensor) -> tuple[Tensor, Tensor]:
    B_TM = torch.eye(len(vectors.G_TT), dtype=torch.float64)[:, index_M]
    return B_TM, vectors.weights(B_TM)


def random_projection(
    vectors: GramFactor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Baseline: B with random orthonormal columns."""
    B_TM = torch.linalg.qr(
        torch.randn(len(vectors.G_TT), size, dtype=torch.float64, generator=generator)
    )[0]
    return B_TM, vectors.weights(B_TM)


METHODS: dict[str, Method] = {
    "ae": ae,
    "ae-adam": ae_adam,
    "ae-anchored": ae_anchored,
    "greedy": greedy,
    "kmeans": kmeans,
    "pca": pca,
    "random-projection": random_projection,
    "random-subset": random_subset,
    "spectral": spectral,
    "svd": svd,
}
