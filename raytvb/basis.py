"""Task vector bases: T task vectors become M < T basis vectors and an M×T table of coefficients.

Zeng et al., "Task Vector Bases", TMLR 2026, arXiv 2502.01015. With task vectors V (D×T) a basis is S = V B and the
vectors come back as V̂ = S W. Everything here needs only the Gram matrix G = VᵀV, never a D-sized vector:

    L(B, W) = ‖V B W − V‖² / ‖V‖² = tr((BW − I)ᵀ G (BW − I)) / tr(G),    best W for a given B: (BᵀGB)⁺ BᵀG.

Shape suffixes: T tasks, M basis vectors, R numerical rank of G; G_TT, F_RT (G = FᵀF, rows orthogonal, norms
falling), B_TM, W_MT. Everything is float64 on the CPU, and G is divided by its trace first, so a fit does not
depend on the scale of the vectors.
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import minimize
from torch import Tensor

Array = NDArray[np.float64]
Method = Callable[[Tensor, int, torch.Generator], tuple[Tensor, Tensor]]
EPS = torch.finfo(torch.float64).eps


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
    """Least loss of any M vectors: the trailing eigenvalue sum of G over tr(G), not centred for any method."""
    condition: float
    """Condition number of BᵀGB with the columns of V B scaled to unit norm; infinite if they are dependent."""
    seconds: float

    @property
    def size(self) -> int:
        """M, the number of stored vectors."""
        return self.B.shape[1]

    @property
    def convex(self) -> bool:
        """True if every basis vector is a convex combination of task vectors (to 1e-9)."""
        return bool((self.B >= -1e-9).all()) and bool(((self.B.sum(0) - 1).abs() <= 1e-9).all())


def fit_basis(gram: Tensor, size: int, *, method: str = "ae", generator: torch.Generator | None = None) -> BasisFit:
    """Fit `size` basis vectors to the vectors whose Gram matrix is `gram`.

    gram: (T, T) symmetric positive semi-definite, any real dtype. method: a key of METHODS. generator: the source of
    every random draw; None is one seeded with 0. With `size` ≥ T the basis is the vectors themselves, with a warning.
    Raises ValueError for an unknown method, a size below 1, and a Gram that is not square, finite, symmetric, positive
    semi-definite and non-zero.
    """
    if method not in METHODS:
        raise ValueError(f"unknown basis method {method!r}; there are: {', '.join(sorted(METHODS))}")
    if size < 1:
        raise ValueError(f"basis size must be at least 1, got {size}")
    started = time.perf_counter()
    G_TT = _normalised(gram)
    tasks = len(G_TT)
    if size >= tasks:
        warnings.warn(f"basis size {size} is not below the {tasks} vectors: they are kept as they are", stacklevel=2)
        B_TM, W_MT = torch.eye(tasks, dtype=torch.float64), torch.eye(tasks, dtype=torch.float64)
    else:
        B_TM, W_MT = METHODS[method](G_TT, size, generator or torch.Generator().manual_seed(0))
    loss, floor, condition = relative_loss(G_TT, B_TM, W_MT), _floor(G_TT, size), _condition(G_TT, B_TM)
    return BasisFit(method, B_TM, W_MT, loss, floor, condition, time.perf_counter() - started)


def best_weights(gram: Tensor, B: Tensor) -> Tensor:
    """The W (M, T) float64 of least loss for a given B (T, M): (BᵀGB)⁺ BᵀG, min ‖F (B W − I)‖² with G = FᵀF.

    Solved by least squares on F B with unit columns, which has the square root of the condition number of BᵀGB.
    """
    F_RT = _factor(gram.double())
    X_RM, norm_M = _unit_columns(F_RT, B.double())
    # 1e-8: directions fainter than this are the rounding error of F, and would only blow up W.
    W_MT = torch.linalg.lstsq(X_RM, F_RT, rcond=1e-8, driver="gelsd").solution
    return torch.where(norm_M[:, None] > 0, W_MT / norm_M[:, None], 0.0)


def relative_loss(gram: Tensor, B: Tensor, W: Tensor) -> float:
    """L(B, W) as ‖F (B W − I)‖² / ‖F‖² with G = FᵀF: unlike the trace it cannot come out negative."""
    F_RT = _factor(gram.double())
    return float((F_RT @ B.double() @ W.double() - F_RT).square().sum() / F_RT.square().sum())


def _normalised(gram: Tensor) -> Tensor:
    """G / tr(G) (T, T) float64, exactly symmetric; ValueError if `gram` is no Gram matrix."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram) or gram.is_complex():
        raise ValueError(f"gram must be a real square matrix, got {gram.dtype} of shape {tuple(gram.shape)}")
    G = gram.detach().to("cpu", torch.float64)
    if not G.isfinite().all():
        raise ValueError(f"gram has {int((~G.isfinite()).sum())} entries that are not finite")
    if not G.any():
        raise ValueError("gram is all zero: there is nothing to fit")
    largest = G.abs().max()
    G = G / largest  # first, so that nothing below over- or underflows
    if (G - G.T).abs().max() > 1e-5:
        raise ValueError(f"gram is not symmetric: entries differ by {float((G - G.T).abs().max()):.1e} of the largest")
    G = (G + G.T) / 2
    values = torch.linalg.eigvalsh(G)
    if values[0] < -1e-3 * values[-1]:  # wide enough for a Gram rounded to bfloat16
        raise ValueError(f"gram is not positive semi-definite: eigenvalue {float(values[0] * largest):.3g}")
    return G / G.trace()


def _eigh(G_TT: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (T,) falling and eigenvectors (T, T), signed so that each one's largest entry is positive."""
    values, U = torch.linalg.eigh(G_TT)
    values, U = values.flip(0), U.flip(1)
    return values, U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()


def _factor(G_TT: Tensor) -> Tensor:
    """F (R, T) with G = FᵀF, rows orthogonal; eigenvalues that are only rounding are dropped."""
    values, U = _eigh(G_TT)
    keep = values > len(G_TT) * EPS * values[0]
    return values[keep].sqrt()[:, None] * U[:, keep].T


def _unit_columns(F_RT: Tensor, B_TM: Tensor) -> tuple[Tensor, Tensor]:
    """F B (R, M) with unit columns and their norms (M,); a column that vanishes up to rounding is exactly zero."""
    X_RM = F_RT @ B_TM
    norm_M = X_RM.norm(dim=0)
    norm_M = torch.where(norm_M > 1e-12 * F_RT.norm() * B_TM.norm(dim=0), norm_M, 0.0)
    return torch.where(norm_M > 0, X_RM / norm_M, 0.0), norm_M


def _condition(G_TT: Tensor, B_TM: Tensor) -> float:
    X_RM, _ = _unit_columns(_factor(G_TT), B_TM)
    values = torch.linalg.svdvals(X_RM)
    if len(values) < B_TM.shape[1] or values[-1] <= 1e-8 * values[0]:
        return math.inf
    return float((values[0] / values[-1]) ** 2)


def _floor(G_TT: Tensor, size: int) -> float:
    return float(_eigh(G_TT)[0][size:].clamp(min=0).sum())


def ae(G_TT: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Columns of B on the simplex, W free: min L over B ≥ 0 (the loss only knows the span), columns scaled at the end.

    The first start is pivoted-Cholesky columns. Where it ends more than 0.5 % above the floor, random starts are
    tried too: few vectors of mixed sign have poor local optima, many vectors do not.
    """
    B_TM = greedy(G_TT, size, generator)[0]
    if size < len(_factor(G_TT)):
        problem = _SimplexProblem(G_TT, size)
        best, B_TM = problem.solve(B_TM)
        for _ in range(min(8, 20_000 // B_TM.numel())):
            if best > 1.005:
                # Draws follow the order of the norms: a fit does not depend on the order of the tasks.
                draws = torch.empty_like(B_TM).exponential_(generator=generator) ** 2
                found, candidate_TM = problem.solve(draws[G_TT.diag().argsort().argsort()])
                best, B_TM = (found, candidate_TM) if found < best else (best, B_TM)
    return B_TM, best_weights(G_TT, B_TM)


class _SimplexProblem:
    """min over B ≥ 0 of L(B, best W) / floor + BARRIER · log of the mean variance inflation of the columns of F B.

    The barrier, tr(C⁻¹)/M with C the columns' cosines, picks well-conditioned columns among those with nearly the
    same span; without it condition numbers reach 1e7, with it the loss rises by less than 0.3 %.
    Rows of B are scaled by 1/√G_tt, so that short vectors move as readily as long ones.
    """

    BARRIER = 2e-3

    def __init__(self, G_TT: Tensor, size: int) -> None:
        F_RT, norm2_T = _factor(G_TT), G_TT.diag()
        scale_T = torch.where(norm2_T > len(G_TT) * EPS * norm2_T.max(), norm2_T.rsqrt(), 0.0)
        self.F_RT: Array = (F_RT * scale_T).numpy()
        self.scale_T = scale_T
        self.energy_R: Array = F_RT.square().sum(1).numpy()
        self.floor = max(_floor(G_TT, size), 1e-10)  # below it the loss is only rounding

    def solve(self, start_TM: Tensor) -> tuple[float, Tensor]:
        """Projected L-BFGS from `start_TM` ≥ 0 mixed with a little uniform: (L / floor, B on the simplex)."""
        start = start_TM.numpy() + 0.05 / len(start_TM)
        result = minimize(
            self.objective,
            start.ravel(),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None)] * start.size,
            options={"maxiter": 1000, "maxfun": 2000, "ftol": 1e-7, "gtol": 1e-10},
        )
        B_TM = self.scale_T[:, None] * torch.from_numpy(result.x.reshape(start.shape))
        return self.ratio(result.x), B_TM / B_TM.sum(0)

    def ratio(self, x: Array) -> float:
        Q_RM = np.linalg.qr(self.F_RT @ x.reshape(self.F_RT.shape[1], -1))[0]
        return float(self.energy_R @ (1 - np.square(Q_RM).sum(1))) / self.floor

    def objective(self, x: Array) -> tuple[float, Array]:
        """Value and gradient. With X = F B = QR: L = tr((I − QQᵀ) FFᵀ), dL/dX = −2 (I − QQᵀ) FFᵀ Q R⁻ᵀ."""
        X_RM = self.F_RT @ x.reshape(self.F_RT.shape[1], -1)
        Q_RM, R_MM = np.linalg.qr(X_RM)
        if np.abs(R_MM.diagonal()).min() < 1e-10 * np.abs(R_MM).max():
            return 1e10, np.zeros_like(x)  # dependent columns: a step that the line search takes back
        Y_RM = self.energy_R[:, None] * Q_RM  # FFᵀ Q: the rows of F are orthogonal
        K_MM = Q_RM.T @ Y_RM
        inv_R_MM = solve_triangular(R_MM, np.eye(len(R_MM)))
        inv_C_MM, norm2_M = inv_R_MM @ inv_R_MM.T, np.square(X_RM).sum(0)
        inflation = float(norm2_M @ inv_C_MM.diagonal())
        value = (self.energy_R.sum() - K_MM.trace()) / self.floor + self.BARRIER * math.log(inflation / len(K_MM))
        grad_RM = (Q_RM @ K_MM - Y_RM) @ (2 / self.floor * inv_R_MM.T)
        pull_RM = X_RM * inv_C_MM.diagonal() - X_RM @ (inv_C_MM @ (norm2_M[:, None] * inv_C_MM))
        grad_RM += 2 * self.BARRIER / inflation * pull_RM
        return float(value), (self.F_RT.T @ grad_RM).ravel()


def ae_anchored(G_TT: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Like `ae` with the mean vector (u = 1/T) as first column, so that the sum of all tasks is decoded exactly.

    Exact: with G′ = G − G11ᵀG / (1ᵀG1) and c_k its top M−1 eigenvectors, b_k = u + ε (c_k − mean) with the largest
    ε that keeps b_k ≥ 0. Its least loss, the sum of λ_k(G′) / tr(G) over k ≥ M, is always reached.
    """
    tasks = len(G_TT)
    sums_T, total = G_TT.sum(1), float(G_TT.sum())
    # A vanishing sum of all vectors is decoded by anything, and takes no direction from the others.
    rest_TT = G_TT - torch.outer(sums_T, sums_T) / total if total > tasks * EPS else G_TT
    C_TK = _eigh(rest_TT)[1][:, : size - 1]
    C_TK = C_TK - C_TK.mean(0)
    C_TK = torch.where(-C_TK.amin(0) > C_TK.amax(0), -C_TK, C_TK)  # of ±c the one that allows the larger ε
    step_K = 1 / (tasks * (-C_TK.amin(0)).clamp(min=1e-8))
    uniform_T1 = torch.full((tasks, 1), 1 / tasks, dtype=torch.float64)
    B_TM = torch.cat([uniform_T1, (uniform_T1 + step_K * C_TK).clamp(min=0)], 1)
    B_TM = B_TM / B_TM.sum(0)
    return B_TM, best_weights(G_TT, B_TM)


def ae_adam(G_TT: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The authors' way, for comparison: joint Adam on (logits of B, W), here on the normalised Gram."""
    F_RT = _factor(G_TT)
    logits_TM = torch.randn(len(G_TT), size, dtype=torch.float64, generator=generator).requires_grad_()
    W_MT = (torch.randn(size, len(G_TT), dtype=torch.float64, generator=generator) / size).requires_grad_()
    optimizer = torch.optim.Adam([logits_TM, W_MT], lr=0.02)
    with torch.enable_grad():
        for _ in range(2000):
            loss = (F_RT @ logits_TM.softmax(0) @ W_MT - F_RT).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return logits_TM.detach().softmax(0), W_MT.detach()


def svd(G_TT: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The top M singular directions of V, not centred: the floor itself. B = U_M, W = U_Mᵀ, U eigenvectors of G."""
    B_TM = _eigh(G_TT)[1][:, :size]
    return B_TM, B_TM.T.contiguous()


def pca(G_TT: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The mean vector and M−1 components of the centred vectors: M stored vectors in all. W = [1ᵀ; C ᵀ]."""
    tasks = len(G_TT)
    centred_TT = G_TT - G_TT.mean(0) - G_TT.mean(1, keepdim=True) + G_TT.mean()
    C_TK = _eigh(centred_TT)[1][:, : size - 1]
    C_TK = C_TK - C_TK.mean(0)  # already centred, unless the eigenvalue is zero
    ones_T1 = torch.ones(tasks, 1, dtype=torch.float64)
    return torch.cat([ones_T1 / tasks, C_TK], 1), torch.cat([ones_T1, C_TK], 1).T.contiguous()


def kmeans(G_TT: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Means of the clusters that k-means finds; the columns of F stand in for the vectors (same distances)."""
    from sklearn.cluster import KMeans  # more than a second to import, and only two methods need it
    from sklearn.exceptions import ConvergenceWarning

    model = KMeans(size, n_init=10, random_state=_seed(generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct vectors than clusters: handled below
        labels = model.fit_predict(_factor(G_TT).T.numpy())
    return _cluster_means(G_TT, labels, size)


def spectral(G_TT: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Means of the clusters that spectral clustering finds; affinity (1 + cosine) / 2, which is never negative."""
    norm_T = G_TT.diag().clamp(min=0).sqrt()
    cosine_TT = G_TT / torch.outer(norm_T, norm_T).clamp(min=1e-300)
    affinity_TT = ((1 + cosine_TT.clamp(-1, 1)) / 2).numpy()
    from sklearn.cluster import SpectralClustering  # as above
    from sklearn.exceptions import ConvergenceWarning

    model = SpectralClustering(size, affinity="precomputed", random_state=_seed(generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = model.fit_predict(affinity_TT)
    return _cluster_means(G_TT, labels, size)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31 - 1, (1,), generator=generator))


def _cluster_means(G_TT: Tensor, labels: NDArray[np.int32], size: int) -> tuple[Tensor, Tensor]:
    """B with column m uniform over the tasks labelled m; an empty cluster takes a task from the largest one."""
    label_T = torch.from_numpy(labels.astype(np.int64))
    for empty in sorted(set(range(size)) - set(label_T.tolist())):
        largest = label_T.bincount(minlength=size).argmax()
        label_T[(label_T == largest).nonzero()[-1]] = empty
    B_TM = torch.nn.functional.one_hot(label_T, size).double()
    B_TM = B_TM / B_TM.sum(0)
    return B_TM, best_weights(G_TT, B_TM)


def greedy(G_TT: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """M of the vectors themselves: each time the one worst explained by those before (column-pivoted Cholesky)."""
    residual_TT, chosen = G_TT.clone(), list[int]()
    for _ in range(size):
        left_T = residual_TT.diag().clone()
        left_T[chosen] = -math.inf
        pivot = int(left_T.argmax())
        chosen.append(pivot)
        if left_T[pivot] > len(G_TT) * EPS:
            residual_TT -= torch.outer(residual_TT[pivot], residual_TT[pivot]) / left_T[pivot]
    return _subset(G_TT, torch.tensor(chosen))


def random_subset(G_TT: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Baseline: M of the vectors, drawn at random."""
    return _subset(G_TT, torch.randperm(len(G_TT), generator=generator)[:size])


def _subset(G_TT: Tensor, index_M: Tensor) -> tuple[Tensor, Tensor]:
    B_TM = torch.eye(len(G_TT), dtype=torch.float64)[:, index_M]
    return B_TM, best_weights(G_TT, B_TM)


def random_projection(G_TT: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Baseline: B with random orthonormal columns."""
    B_TM = torch.linalg.qr(torch.randn(len(G_TT), size, dtype=torch.float64, generator=generator))[0]
    return B_TM, best_weights(G_TT, B_TM)


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
