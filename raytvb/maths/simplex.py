"""Bases of convex combinations: B on the simplex with the least loss and well-conditioned columns.

Zeng et al., "Task Vector Bases", TMLR 2026, arXiv 2502.01015, whose autoencoder has B =
softmax(logits). Here W is eliminated and B ≥ 0 is solved for with projected L-BFGS on the Gram
matrix. Shape suffixes as in `basis`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import lapack, qr
from scipy.optimize import fmin_l_bfgs_b
from torch import Tensor

from raytvb.maths.gram_factor import EPS, GramFactor, condition, unit_columns

Array = NDArray[np.float64]


BARRIER = 1e-3
"""Weight of the log condition number beside L / floor: it costs about 0.01 % of loss, before
columns are made exact.
"""


MOST_CONDITION = 9.5e3
"""Of ae, where up to 0.2 % of loss can buy it."""


SMALL = 500
"""Entries of B up to which evaluations cost next to nothing."""


@dataclass(frozen=True)
class _Columns:
    """Columns on the simplex (T, M) with their L / floor and the condition number of BᵀGB, unit
    columns.
    """

    B_TM: Tensor
    ratio: float
    condition: float


def _best(found: Sequence[_Columns]) -> _Columns:
    """Least loss among the well-conditioned; if those cost more than 0.2 % of loss, the best
    conditioned that do not.

    0.8 % where the floor is out of reach: there the best bases of few vectors are often degenerate.
    """
    lowest = min(f.ratio for f in found)
    limit = max(1.002, 1.008 * lowest) if lowest > 1.0001 else 1.002
    cheap = [f for f in found if f.ratio <= limit]
    good = [f for f in cheap if f.condition <= MOST_CONDITION]
    return min(good, key=lambda f: f.ratio) if good else min(cheap, key=lambda f: f.condition)


class _Simplex:
    """min over B ≥ 0 of L(B, best W) / floor + barrier · log ‖C⁻¹‖₁₆, C the cosines of the columns
    of F B.

    The barrier, a smooth log of the largest 1 / eigenvalue of C, picks well-conditioned columns
    among those with nearly the same span; without it condition numbers reach 1e7. Rows of B are
    scaled by 1/√G_tt, so that short vectors move as readily as long ones. `best_TK`: V times these
    spans the best space there is; `fixed_T1`: columns of B that stay.
    """

    def __init__(
        self,
        vectors: GramFactor,
        best_TK: Tensor,
        floor: float,
        size: int,
        fixed_T1: Tensor | None = None,
    ) -> None:
        norm2_T = vectors.G_TT.diag()
        self.vectors, self.size = vectors, size
        self.floor = max(floor, 1e-10)  # below it the loss is only rounding
        self.inside_TK: Array = vectors.inside(best_TK).numpy()
        self.scale_T = torch.where(
            norm2_T > len(norm2_T) * EPS * norm2_T.max(), norm2_T.rsqrt(), 0.0
        )
        self.fixed_T1 = (
            torch.empty(len(norm2_T), 0, dtype=torch.float64) if fixed_T1 is None else fixed_T1
        )
        self._scaled_RT: Array = (vectors.F_RT * self.scale_T).numpy()
        self._fixed_R1: Array = (vectors.F_RT @ self.fixed_T1).numpy()
        self._energy_R: Array = vectors.energy_R.numpy()
        self._total = float(vectors.energy_R.sum())

    def start(self) -> Tensor:
        """Columns (T, M) ≥ 0 in the best span U, or near it: the points U a ≥ 0 next to each task,
        as spread as can be.

        Least squares to e_t by ADMM, of which 30 steps are enough for a start, for each t; the best
        conditioned M of the T results by column-pivoted QR.
        """
        U_TK = self.inside_TK
        targets_KT = U_TK.T
        Z_TT = np.maximum(U_TK @ targets_KT, 0)
        dual_TT = np.zeros_like(Z_TT)
        for _ in range(30):
            points_TT = 1.6 * (U_TK @ ((targets_KT + U_TK.T @ (Z_TT - dual_TT)) / 2)) - 0.6 * Z_TT
            Z_TT = np.maximum(points_TT + dual_TT, 0)
            dual_TT += points_TT - Z_TT
        sum_T = Z_TT.sum(0)
        lost_T = sum_T < 1e-3 / len(sum_T)  # the cone is empty, or has nothing near this task
        Z_TT[:, lost_T] = np.eye(len(sum_T))[:, lost_T]
        Z_TT /= Z_TT.sum(0)
        X_RT: Array = unit_columns(self.vectors.F_RT, torch.from_numpy(Z_TT))[0].numpy()
        mean_R = X_RT.sum(1)
        # Unit columns tie: which is the first pivot must not be left to rounding.
        X_RT *= 1.1 - 0.1 * (mean_R @ X_RT) / max(float(np.linalg.norm(mean_R)), 1e-300)
        fixed_R1 = np.linalg.qr(self._fixed_R1)[0]
        R_TT, order_T = qr(X_RT - fixed_R1 @ (fixed_R1.T @ X_RT), mode="r", pivoting=True)
        if abs(R_TT[self.size - 1, self.size - 1]) < 1e-7:
            return self.tasks()
        return torch.from_numpy(Z_TT[:, order_T[: self.size]])

    def tasks(self) -> Tensor:
        """The other start (T, M): vectors that explain the rest."""
        return torch.eye(len(self.scale_T), dtype=torch.float64)[
            :, self.vectors.pivots[: self.size]
        ]

    def solve(self, start_TM: Tensor, barrier: float, tolerance: float = 1e-5) -> _Columns:
        """Projected L-BFGS from `start_TM` ≥ 0."""
        scale_T1 = self.scale_T[:, None]
        start_TM = torch.where(scale_T1 > 0, start_TM / scale_T1, 0.0)
        start: Array = (start_TM / start_TM.sum(0)).numpy()
        x, _, _ = fmin_l_bfgs_b(
            self.objective,
            start.ravel(),
            args=(barrier,),
            bounds=[(0, None)] * start.size,
            # Time is dear with many entries; a higher tolerance than this would be met by the
            # first, short step.
            factr=tolerance * min(max((start.size / 10_000) ** 0.6, 0.3), 3) / EPS,
            maxfun=int(min(max(1e7 / start.size, 35), 150)),
            pgtol=1e-10,
        )
        B_TM = scale_T1 * torch.from_numpy(x.reshape(start.shape))
        return self.measured(B_TM / B_TM.sum(0))

    def measured(self, B_TM: Tensor) -> _Columns:
        """The given columns, after the fixed ones, with their figures."""
        all_TM = torch.cat([self.fixed_T1, B_TM], 1)
        Q_RM = torch.linalg.qr(unit_columns(self.vectors.F_RT, all_TM)[0])[0]
        ratio = float(self.vectors.energy_R @ (1 - Q_RM.square().sum(1))) / self.floor
        return _Columns(B_TM, ratio, condition(self.vectors.F_RT, all_TM))

    def moved_inside(self, B_TM: Tensor) -> _Columns | None:
        """The columns projected on the best span, with as much of a positive vector of it as makes
        them ≥ 0.

        None if neither the fixed column nor the mean of the projected ones is positive enough.
        """
        U_TK = torch.from_numpy(self.inside_TK)
        inside_TM = U_TK @ (U_TK.T @ B_TM)
        need_TM = torch.where(inside_TM < -1e-14 * inside_TM.abs().max(), -inside_TM, 0.0)
        best: tuple[float, Tensor] | None = None
        for positive_T in (inside_TM.mean(1), *self.fixed_T1.T):
            much_TM = torch.where(need_TM > 0, need_TM / positive_T.clamp(min=1e-300)[:, None], 0.0)
            much_M = much_TM.amax(0)
            if much_M.max() < 1e3 and (best is None or float(much_M.max()) < best[0]):
                best = float(much_M.max()), inside_TM + much_M * positive_T[:, None]
        if best is None:
            return None
        B_TM = best[1].clamp(min=0)
        return self.measured(B_TM / B_TM.sum(0))

    def objective(self, x: Array, barrier: float) -> tuple[float, Array]:
        """Value and gradient. With X = F B = QR: L = tr(E − QᵀEQ), E = F Fᵀ, dL/dX = −2 (I − QQᵀ) E
        Q R⁻ᵀ.
        """
        X_RM = np.hstack([self._fixed_R1, self._scaled_RT @ x.reshape(-1, self.size)])
        norm_M = np.sqrt(np.square(X_RM).sum(0))
        X_RM /= np.maximum(norm_M, 1e-300)
        found = _orthonormal(X_RM)
        if found is None:
            return 1e10, np.zeros_like(
                x
            )  # dependent columns: a step that the line search takes back
        Q_RM, inv_R_MM = found
        Y_RM = self._energy_R[:, None] * Q_RM
        K_MM = Q_RM.T @ Y_RM
        inv_C_MM = inv_R_MM @ inv_R_MM.T
        power_MM = np.linalg.matrix_power(inv_C_MM, 8)
        trace = float(np.square(power_MM).sum())  # of C⁻¹⁶
        value = (self._total - K_MM.trace()) / self.floor + barrier / 16 * math.log(
            trace / len(K_MM)
        )
        along_MM = 2 / self.floor * K_MM @ inv_R_MM.T - (2 * barrier / trace * inv_R_MM.T) @ (
            power_MM @ power_MM
        )
        grad_RM = Q_RM @ along_MM - Y_RM @ (2 / self.floor * inv_R_MM.T)
        # The columns have unit norm whatever x: what would change it is taken out.
        grad_RM -= X_RM * (X_RM * grad_RM).sum(0)
        free = self._fixed_R1.shape[1]
        return float(value), (self._scaled_RT.T @ (grad_RM / norm_M)[:, free:]).ravel()


def _orthonormal(X_RM: Array) -> tuple[Array, Array] | None:
    """Q (R, M) and R⁻¹ (M, M) of X = QR; None if columns are dependent. Cholesky twice: faster than
    Householder.
    """
    Q_RM, inv_MM = X_RM, np.eye(X_RM.shape[1])
    for _ in range(
        2
    ):  # the second makes Q orthonormal to rounding, up to condition numbers near 1e15
        R_MM, failed = lapack.dpotrf(Q_RM.T @ Q_RM)
        if failed:
            return None
        step_MM = lapack.dtrtri(R_MM)[0]
        Q_RM, inv_MM = Q_RM @ step_MM, inv_MM @ step_MM
    return Q_RM, inv_MM


def ae(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Columns of B on the simplex, W free: min L over B ≥ 0 (the loss only knows the span), columns
    scaled at the end.

    Where the best span of all holds a strictly positive combination, it holds M independent ones:
    the floor is reached exactly, and the columns are only chosen for their condition number. Where
    that stays above MOST_CONDITION, as with a strong common mean, up to 0.2 % of loss is paid for
    it. Elsewhere the loss is minimised, from random starts too if it ends more than 0.5 % above the
    floor: few vectors of mixed sign have poor local optima.
    """
    if size == vectors.rank:
        B_TM = torch.eye(len(vectors.G_TT), dtype=torch.float64)[:, vectors.pivots[:size]]
        return B_TM, vectors.weights(B_TM)
    problem = _Simplex(vectors, vectors.inverse_TR[:, :size], vectors.floor(size), size)
    start = problem.measured(problem.start())
    # Solving lowers the condition number some 50 times: where that will not do, the first barrier
    # is a high one.
    barrier = BARRIER if start.condition < 40 * MOST_CONDITION else 6 * BARRIER
    found = [problem.solve(start.B_TM, barrier)]
    exact = problem.moved_inside(found[0].B_TM)
    if exact is not None:
        found.append(exact)
    best = _best(found)
    for _ in range(3):
        if best.condition <= MOST_CONDITION or best.ratio > 1.0014:
            break
        # The excess loss grows with the square of the barrier: this is the one that costs 0.18 %.
        barrier *= min(math.sqrt(1.8e-3 / max(best.ratio - 1, 1e-5)), 10)
        found.append(problem.solve(best.B_TM, barrier))
        best = _best(found)
    satisfied = 1.002 if exact is not None else 1.001 if best.B_TM.numel() > 10 * SMALL else 1.0
    if best.ratio > satisfied:
        best = _search(problem, found, generator)
    return best.B_TM, vectors.weights(best.B_TM)


def _search(problem: _Simplex, found: list[_Columns], generator: torch.Generator) -> _Columns:
    """Lower loss than that of the columns found so far: random starts, then lower barriers from the
    best ones.
    """
    entries = found[0].B_TM.numel()
    order_T = problem.vectors.G_TT.diag().argsort().argsort()
    if _best(found).ratio > 1.005:
        found.append(problem.solve(problem.tasks(), BARRIER, 1e-3))
    for _ in range(min(6, 20_000 // entries)):
        if _best(found).ratio > 1.005:
            # Draws follow the order of the norms: a fit does not depend on the order of the tasks.
            draws = torch.empty_like(found[0].B_TM).exponential_(generator=generator) ** 2
            found.append(problem.solve(draws[order_T], BARRIER, 1e-3))
    tolerance = 1e-6 if entries < SMALL else 1e-5
    for lower in (10, 100) if entries < SMALL else (10,):
        found.append(problem.solve(_best(found).B_TM, BARRIER / lower, tolerance))
        exact = problem.moved_inside(found[-1].B_TM)
        if exact is not None:
            found.append(exact)
        if found[-1].condition > MOST_CONDITION:
            found.append(problem.solve(found[-1].B_TM, 3 * BARRIER / lower, tolerance))
        if not 1.0001 < _best(found).ratio <= 1.0005:
            break
    return _best(found)


def ae_anchored(
    vectors: GramFactor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Like `ae` with u = 1/T, the mean vector, as first column, so that the sum of all tasks is
    decoded exactly.

    With the top M−1 directions c_k beside V u, the span of u and the c_k is the best there is, and
    u + ε c_k ≥ 0: the least loss, the sum of the energies beyond the c_k, is always reached.
    """
    mean_T1 = torch.full((len(vectors.G_TT), 1), 1 / len(vectors.G_TT), dtype=torch.float64)
    energy_R, C_TR = vectors.beside_mean
    if size == 1:
        return mean_T1, vectors.weights(mean_T1)
    best_TM, fixed_T1 = C_TR[:, : size - 1], None
    if (vectors.F_RT @ mean_T1).norm() > len(mean_T1) * EPS * vectors.F_RT.norm():
        best_TM, fixed_T1 = torch.cat([mean_T1, best_TM], 1), mean_T1
    problem = _Simplex(
        vectors, best_TM, float(energy_R[size - 1 :].clamp(min=0).sum()), size - 1, fixed_T1
    )
    columns = problem.solve(problem.start(), BARRIER)
    columns = problem.moved_inside(columns.B_TM) or problem.solve(columns.B_TM, BARRIER / 10)
    B_TM = torch.cat([mean_T1, columns.B_TM], 1)
    return B_TM, vectors.weights(B_TM)
