"""Task vector bases: T task vectors become M < T basis vectors and an M×T table of coefficients.

Zeng et al., "Task Vector Bases", TMLR 2026, arXiv 2502.01015. With task vectors V (D×T) a basis is
S = V B and the vectors come back as V̂ = S W. Everything here needs only the Gram matrix G = VᵀV,
never a D-sized vector:

    L(B, W) = ‖V B W − V‖² / ‖V‖² = tr((BW − I)ᵀ G (BW − I)) / tr(G),    best W for a given B:
    (BᵀGB)⁺ BᵀG.

Shape suffixes: T tasks, M basis vectors, R numerical rank of G, K any number of directions; G_TT,
F_RT (G = FᵀF, F Fᵀ diagonal and falling), B_TM, W_MT. Everything is float64 on the CPU, and G is
divided by its trace first, so a fit does not depend on the scale of the vectors.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytvb.maths.basis_methods import METHODS, greedy
from raytvb.maths.gram_factor import GramFactor, condition, factor, least_squares


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
    """Least L of any M vectors: the trailing eigenvalue sum of G over tr(G), not centred for any
    method.
    """
    condition: float
    """Condition number of BᵀGB with the columns of V B scaled to unit norm; infinite if they are
    dependent.
    """
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
    """Fit `size` basis vectors to the vectors whose Gram matrix is `gram`: `fit_bases` with one
    size.
    """
    return fit_bases(gram, [size], method=method, generator=generator)[0]


def fit_bases(
    gram: Tensor,
    sizes: Sequence[int],
    *,
    method: str = "ae",
    generator: torch.Generator | None = None,
) -> list[BasisFit]:
    """Fit a basis of each size; the eigenvectors are computed once, and each fit is the one
    `fit_basis` makes.

    gram: (T, T) symmetric positive semi-definite, any real dtype. method: a key of METHODS.
    generator: the source of every random draw, taken back to its state for each size; None is one
    seeded with 0. With `size` ≥ T the basis is the vectors themselves, and above their rank an
    exact one of as few vectors as the method needs, both with a warning.
    Raises ValueError for an unknown method, a size below 1, and a Gram that is not square, finite,
    symmetric, positive semi-definite and non-zero.
    """
    if method not in METHODS:
        raise ValueError(
            f"unknown basis method {method!r}; there are: {', '.join(sorted(METHODS))}"
        )
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
        fits.append(
            BasisFit(method, B_TM, W_MT, loss, floor, conditioned, time.perf_counter() - started)
        )
    return fits


def _fit(
    vectors: GramFactor, size: int, method: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    tasks, rank = len(vectors.G_TT), vectors.rank
    if size >= tasks:
        warnings.warn(
            f"basis size {size} is not below the {tasks} vectors: they are kept as they are",
            stacklevel=4,
        )
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
        f"the vectors have rank {rank}: {B_TM.shape[1]} basis vectors are exact, of the {size} asked for",
        stacklevel=4,
    )
    return B_TM, W_MT


def best_weights(gram: Tensor, B: Tensor) -> Tensor:
    """The W (M, T) float64 of least loss for a given B (T, M): (BᵀGB)⁺ BᵀG, min ‖F (B W − I)‖² with
    G = FᵀF.

    Solved by least squares on F B with unit columns, which has the square root of the condition
    number of BᵀGB.
    """
    return least_squares(factor(gram.double()), B.double())


def relative_loss(gram: Tensor, B: Tensor, W: Tensor) -> float:
    """L(B, W) as ‖F (B W − I)‖² / ‖F‖² with G = FᵀF: unlike the trace it cannot come out
    negative.
    """
    F_RT = factor(gram.double())
    return float((F_RT @ B.double() @ W.double() - F_RT).square().sum() / F_RT.square().sum())


def task_errors(gram: Tensor, fit: BasisFit) -> Tensor:
    """Relative squared error ‖S w_t − v_t‖² / ‖v_t‖² of each task (T,) float64; 0 for a zero
    vector.
    """
    rest = fit.B @ fit.W - torch.eye(len(gram), dtype=torch.float64)
    error, norm = (rest * (gram.double() @ rest)).sum(dim=0).clamp(min=0), gram.double().diagonal()
    return torch.where(norm > 0, error / norm.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
