"""Task vector bases: T task vectors become M < T basis vectors and an M×T table of coefficients.

Zeng et al., "Task Vector Bases", TMLR 2026, arXiv 2502.01015. With task vectors V (D×T) a basis is S = V B and the
vectors come back as V̂ = S W. Everything here needs only the Gram matrix G = VᵀV, never a D-sized vector:

    L(B, W) = ‖V B W − V‖² / ‖V‖² = tr((BW − I)ᵀ G (BW − I)) / tr(G),    best W for a given B: (BᵀGB)⁺ BᵀG.

Shape suffixes: T tasks, M basis vectors, R numerical rank of G, K any number of directions; G_TT, F_RT (G = FᵀF,
F Fᵀ diagonal and falling), B_TM, W_MT. Everything is float64 on the CPU, and G is divided by its trace first, so a
fit does not depend on the scale of the vectors.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytvb.factor import GramFactor, condition, factor, least_squares
from raytvb.simplex import ae, ae_anchored

Method = Callable[[GramFactor, int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class BasisFit:
    """A fitted basis. `loss` and `floor` are fractions of ‖V‖²."""

    method: str
    B: Tensor
    """(T, M) float64: basis vector m is Σ_t B[t, m] τ_t."""
    W: Tensor
    """(M, T) float64: task t comes back as Σ_m W[m, t] s_m."""
    loss: float
    """L(B, W)."""
    floor: float
    """Least L of any M vectors: the trailing eigenvalue sum of G over tr(G), not centred for any method."""
    condition: float
    """Condition number of BᵀGB with the columns of V B scaled to unit norm; infinite if they are dependent."""
    seconds: float
    """Time of this fit, with all of what fits of several sizes share."""

    @property
    def size(self) -> int:
        """M, the number of stored vectors."""
        return self.B.shape[1]

    @property
    def convex(self) -> bool:
        """True if every basis vector is a convex combination of task vectors (to 1e-9)."""
        return bool((self.B >= -1e-9).all()) and bool(((self.B.sum(0) - 1).abs() <= 1e-9).all())


def fit_basis(
    gram: Tensor,
    size: int,
    *,
    method: str = "ae",
    generator: torch.Generator | None = None,
) -> BasisFit:
    """Fit `size` basis vectors to the vectors whose Gram matrix is `gram`: `fit_bases` with one size."""
    return fit_bases(gram, [size], method=method, generator=generator)[0]


def fit_bases(
    gram: Tensor,
    sizes: Sequence[int],
    *,
    method: str = "ae",
    generator: torch.Generator | None = None,
) -> list[BasisFit]:
    """Fit a basis of each size; the eigenvectors are computed once, and each fit is the one `fit_basis` makes.

    gram: (T, T) symmetric positive semi-definite, any real dtype. method: a key of METHODS. generator: the source of
    every random draw, taken back to its state for each size; None is one seeded with 0.
    With `size` ≥ T the basis is the vectors themselves, and above their rank an exact one of as few vectors as the
    method needs, both with a warning.
    Raises ValueError for an unknown method, a size below 1, and a Gram that is not square, finite, symmetric, positive
    semi-definite and non-zero.
    """
    if method not in METHODS:
        raise ValueError(f"unknown basis method {method!r}; there are: {', '.join(sorted(METHODS))}")
    sizes = list(sizes)
    for size in sizes:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"basis size must be a whole number of at least 1, got {size!r}")
    started = time.perf_counter()
    vectors = GramFactor(gram)
    shared = time.perf_counter() - started
    generator = generator or torch.Generator().manual_seed(0)
    state, fits = generator.get_state(), list[BasisFit]()
    for size in sizes:
        started = time.perf_counter() - shared
        generator.set_state(state)
        B_TM, W_MT = _fit(vectors, size, method, generator)
        loss, floor = vectors.loss(B_TM, W_MT), vectors.floor(B_TM.shape[1])
        conditioned = condition(vectors.F_RT, B_TM)
        fits.append(BasisFit(method, B_TM, W_MT, loss, floor, conditioned, time.perf_counter() - started))
    return fits


def _fit(vectors: GramFactor, size: int, method: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tasks, rank = len(vectors.G_TT), vectors.rank
    if size >= tasks:
        warnings.warn(f"basis size {size} is not below the {tasks} vectors: they are kept as they are", stacklevel=4)
        return torch.eye(tasks, dtype=torch.float64), torch.eye(tasks, dtype=torch.float64)
    if size <= rank:
        return METHODS[method](vectors, size, generator)
    # With a first column that is given, the others may have to explain all by themselves.
    for enough in (rank, rank + 1) if method in ("ae-anchored", "pca") else (rank,):
        B_TM, W_MT = METHODS[method](vectors, enough, generator)
        if vectors.loss(B_TM, W_MT) < 1e-12:
            break
    else:
        B_TM, W_MT = greedy(vectors, rank, generator)
    warnings.warn(
        f"the vectors have rank {rank}: {B_TM.shape[1]} basis vectors are exact, of the {size} asked for", stacklevel=4
    )
    return B_TM, W_MT


def best_weights(gram: Tensor, B: Tensor) -> Tensor:
    """The W (M, T) float64 of least loss for a given B (T, M): (BᵀGB)⁺ BᵀG, min ‖F (B W − I)‖² with G = FᵀF.

    Solved by least squares on F B with unit columns, which has the square root of the condition number of BᵀGB.
    """
    return least_squares(factor(gram.double()), B.double())


def relative_loss(gram: Tensor, B: Tensor, W: Tensor) -> float:
    """L(B, W) as ‖F (B W − I)‖² / ‖F‖² with G = FᵀF: unlike the trace it cannot come out negative."""
    F_RT = factor(gram.double())
    return float((F_RT @ B.double() @ W.double() - F_RT).square().sum() / F_RT.square().sum())


def ae_adam(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The authors' way, for comparison: joint Adam on (logits of B, W), here on the normalised Gram."""
    F_RT = vectors.F_RT
    logits_TM = torch.randn(F_RT.shape[1], size, dtype=torch.float64, generator=generator).requires_grad_()
    W_MT = (torch.randn(size, F_RT.shape[1], dtype=torch.float64, generator=generator) / size).requires_grad_()
    optimizer = torch.optim.Adam([logits_TM, W_MT], lr=0.02)
    with torch.enable_grad():
        for _ in range(2000):
            loss = (F_RT @ logits_TM.softmax(0) @ W_MT - F_RT).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return logits_TM.detach().softmax(0), W_MT.detach()


def svd(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The top M singular directions of V, not centred: the floor itself. B = U_M, W = U_Mᵀ, U eigenvectors of G."""
    B_TM = vectors.U_TR[:, :size]
    return B_TM, B_TM.T.contiguous()


def pca(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The mean vector and M−1 components of the centred vectors: M stored vectors in all. W = [1ᵀ; C ᵀ]."""
    tasks = len(vectors.G_TT)
    C_TK = vectors.centred[:, : size - 1]
    C_TK = C_TK - C_TK.mean(0)  # already centred, unless the eigenvalue is zero
    ones_T1 = torch.ones(tasks, 1, dtype=torch.float64)
    return torch.cat([ones_T1 / tasks, C_TK], 1), torch.cat([ones_T1, C_TK], 1).T.contiguous()


def kmeans(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Means of the clusters that k-means finds; the columns of F stand in for the vectors (same distances)."""
    from sklearn.cluster import KMeans  # more than a second to import, and only two methods need it
    from sklearn.exceptions import ConvergenceWarning

    model = KMeans(size, n_init=10, random_state=_seed(generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct vectors than clusters: handled below
        labels = model.fit_predict(vectors.F_RT.T.numpy())
    return _cluster_means(vectors, labels, size)


def spectral(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Means of the clusters that spectral clustering finds; affinity (1 + cosine) / 2, which is never negative.

    Its k-means weighs each vector by its squared norm: the loss does, and the affinity knows no norms.
    """
    norm_T = vectors.G_TT.diag().clamp(min=0).sqrt()
    cosine_TT = vectors.G_TT / torch.outer(norm_T, norm_T).clamp(min=1e-300)
    affinity_TT = ((1 + cosine_TT.clamp(-1, 1)) / 2).numpy()
    from sklearn.cluster import KMeans  # as above
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.manifold import spectral_embedding

    seed = _seed(generator)
    embedded_TM = spectral_embedding(affinity_TT, n_components=size, drop_first=False, random_state=seed)
    model = KMeans(size, n_init=10, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = model.fit_predict(embedded_TM, sample_weight=norm_T.square().numpy())
    return _cluster_means(vectors, labels, size)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31 - 1, (1,), generator=generator))


def _cluster_means(vectors: GramFactor, labels: NDArray[np.int32], size: int) -> tuple[Tensor, Tensor]:
    """B with column m uniform over the tasks labelled m; an empty cluster takes a task from the largest one."""
    label_T = torch.from_numpy(labels.astype(np.int64))
    for empty in sorted(set(range(size)) - set(label_T.tolist())):
        largest = label_T.bincount(minlength=size).argmax()
        label_T[(label_T == largest).nonzero()[-1]] = empty
    B_TM = torch.nn.functional.one_hot(label_T, size).double()
    B_TM = B_TM / B_TM.sum(0)
    return B_TM, vectors.weights(B_TM)


def greedy(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """M of the vectors themselves: each time the one worst explained by those before (column-pivoted Cholesky)."""
    return _subset(vectors, torch.tensor(vectors.pivots[:size]))


def random_subset(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Baseline: M of the vectors, drawn at random."""
    return _subset(vectors, torch.randperm(len(vectors.G_TT), generator=generator)[:size])


def _subset(vectors: GramFactor, index_M: Tensor) -> tuple[Tensor, Tensor]:
    B_TM = torch.eye(len(vectors.G_TT), dtype=torch.float64)[:, index_M]
    return B_TM, vectors.weights(B_TM)


def random_projection(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Baseline: B with random orthonormal columns."""
    B_TM = torch.linalg.qr(torch.randn(len(vectors.G_TT), size, dtype=torch.float64, generator=generator))[0]
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
