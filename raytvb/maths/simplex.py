"""B with columns on the simplex, the least loss and a good condition number: the problem and its
solver.

Zeng et al., "Task Vector Bases", TMLR 2026, arXiv 2502.01015, whose autoencoder has B =
softmax(logits). Here W is eliminated, and projected L-BFGS on the Gram matrix finds B ≥ 0. Shape
suffixes as in `basis_fit`; K any number of columns. `simplex_columns` says which problems are
solved for which method.
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
"""Weight of the log condition number beside L / floor. It costs about 0.01 % of loss, before the
columns are made exact.
"""

MOST_CONDITION = 9.5e3
"""Condition number that `ae` aims to stay below. It accepts up to 0.2 % more loss for that."""


@dataclass(frozen=True)
class Columns:
    """Columns on the simplex, and how good they are."""

    B_TM: Tensor
    """(T, M), without the fixed column of the problem."""
    ratio: float
    """L / floor of all columns, the fixed column included."""
    condition: float
    """Condition number of BᵀGB for all columns, each V b of unit length."""


def best_columns(candidates: Sequence[Columns]) -> Columns:
    """The candidate of least loss among those with a condition number up to MOST_CONDITION.

    Only candidates within 0.2 % of the floor are considered. Where the floor is out of reach, the
    limit is 0.8 % above the least loss, because the best bases of few vectors are often degenerate.
    If none of these is well-conditioned, the result is the one with the lowest condition number.
    """
    lowest = min(c.ratio for c in candidates)
    limit = max(1.002, 1.008 * lowest) if lowest > 1.0001 else 1.002
    cheap = [c for c in candidates if c.ratio <= limit]
    well_conditioned = [c for c in cheap if c.condition <= MOST_CONDITION]
    if well_conditioned:
        return min(well_conditioned, key=lambda c: c.ratio)
    return min(cheap, key=lambda c: c.condition)


class SimplexProblem:
    """min over B ≥ 0 of L(B, best W) / floor + barrier · log ‖C⁻¹‖₁₆.

    C are the cosines of the columns of F B. The barrier is a smooth log of the largest
    1 / eigenvalue of C: it picks well-conditioned columns among those with nearly the same span.
    Without it condition numbers reach 1e7. Rows of B are scaled by 1/√G_tt, so that short vectors
    move as readily as long ones.
    """

    def __init__(
        self,
        vectors: GramFactor,
        best_TK: Tensor,
        floor: float,
        size: int,
        fixed_T1: Tensor | None = None,
    ) -> None:
        """best_TK: V times these columns spans the best possible space.

        floor: the least possible loss, which that space has. size: M, the number of free columns.
        fixed_T1: a column of B that is not changed; None: there is none.
        """
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
        """Columns (T, M) ≥ 0 in the best span U, or near it, as far apart as possible.

        For each task t the point U a ≥ 0 nearest to e_t is found by ADMM, of which 30 steps are
        enough for a start. Column-pivoted QR then takes the best conditioned M of these T points.
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
        # Unit columns tie. They are scaled so that rounding does not choose the first pivot.
        X_RT *= 1.1 - 0.1 * (mean_R @ X_RT) / max(float(np.linalg.norm(mean_R)), 1e-300)
        fixed_R1 = np.linalg.qr(self._fixed_R1)[0]
        R_TT, order_T = qr(X_RT - fixed_R1 @ (fixed_R1.T @ X_RT), mode="r", pivoting=True)
        if abs(R_TT[self.size - 1, self.size - 1]) < 1e-7:
            return self.tasks()
        return torch.from_numpy(Z_TT[:, order_T[: self.size]])

    def tasks(self) -> Tensor:
        """Another start (T, M): the task vectors that best explain the others."""
        return self.vectors.subset(self.vectors.pivots[: self.size])[0]

    def solve(self, start_TM: Tensor, barrier: float, tolerance: float = 1e-5) -> Columns:
        """The columns that projected L-BFGS reaches from `start_TM` (T, M) ≥ 0.

        barrier: the weight of the log condition number in `objective`.
        """
        scale_T1 = self.scale_T[:, None]
        start_TM = torch.where(scale_T1 > 0, start_TM / scale_T1, 0.0)
        start: Array = (start_TM / start_TM.sum(0)).numpy()
        x, _, _ = fmin_l_bfgs_b(
            self.objective,
            start.ravel(),
            args=(barrier,),
            bounds=[(0, None)] * start.size,
            # The tolerance grows with the number of entries, to save time. A higher tolerance than
            # this would be met by the first, short step.
            factr=tolerance * min(max((start.size / 10_000) ** 0.6, 0.3), 3) / EPS,
            maxfun=int(min(max(1e7 / start.size, 35), 150)),
            pgtol=1e-10,
        )
        B_TM = scale_T1 * torch.from_numpy(x.reshape(start.shape))
        return self.measured(B_TM / B_TM.sum(0))

    def measured(self, B_TM: Tensor) -> Columns:
        """B (T, M) with its loss and condition number, both taken with the fixed column."""
        all_TM = torch.cat([self.fixed_T1, B_TM], 1)
        Q_RM = torch.linalg.qr(unit_columns(self.vectors.F_RT, all_TM)[0])[0]
        ratio = float(self.vectors.energy_R @ (1 - Q_RM.square().sum(1))) / self.floor
        return Columns(B_TM, ratio, condition(self.vectors.F_RT, all_TM))

    def moved_inside(self, B_TM: Tensor) -> Columns | None:
        """The columns projected on the best span, then moved along a positive vector of it until
        they are ≥ 0.

        The positive vector is the fixed column or the mean of the projected columns. The result is
        None if neither is positive enough.
        """
        U_TK = torch.from_numpy(self.inside_TK)
        inside_TM = U_TK @ (U_TK.T @ B_TM)
        need_TM = torch.where(inside_TM < -1e-14 * inside_TM.abs().max(), -inside_TM, 0.0)
        best: tuple[float, Tensor] | None = None
        for positive_T in (inside_TM.mean(1), *self.fixed_T1.T):
            step_TM = torch.where(need_TM > 0, need_TM / positive_T.clamp(min=1e-300)[:, None], 0.0)
            step_M = step_TM.amax(0)
            if step_M.max() < 1e3 and (best is None or float(step_M.max()) < best[0]):
                best = float(step_M.max()), inside_TM + step_M * positive_T[:, None]
        if best is None:
            return None
        B_TM = best[1].clamp(min=0)
        return self.measured(B_TM / B_TM.sum(0))

    def objective(self, x: Array, barrier: float) -> tuple[float, Array]:
        """Value and gradient at x, the entries of B with its rows scaled.

        With X = F B = QR and E = F Fᵀ: L = tr(E − QᵀEQ), dL/dX = −2 (I − QQᵀ) E Q R⁻ᵀ.
        """
        X_RM = np.hstack([self._fixed_R1, self._scaled_RT @ x.reshape(-1, self.size)])
        norm_M = np.sqrt(np.square(X_RM).sum(0))
        X_RM /= np.maximum(norm_M, 1e-300)
        factors = _orthonormal(X_RM)
        if factors is None:  # dependent columns: a step that the line search takes back
            return 1e10, np.zeros_like(x)
        Q_RM, inv_R_MM = factors
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
        # The columns have unit norm for every x, so the gradient's part along them is removed.
        grad_RM -= X_RM * (X_RM * grad_RM).sum(0)
        free = self._fixed_R1.shape[1]
        return float(value), (self._scaled_RT.T @ (grad_RM / norm_M)[:, free:]).ravel()


def _orthonormal(X_RM: Array) -> tuple[Array, Array] | None:
    """Q (R, M) and R⁻¹ (M, M) of X = QR; None if columns are dependent.

    By Cholesky, which is faster than Householder. The second pass makes Q orthonormal to rounding,
    up to condition numbers near 1e15.
    """
    Q_RM, inv_MM = X_RM, np.eye(X_RM.shape[1])
    for _ in range(2):
        R_MM, failed = lapack.dpotrf(Q_RM.T @ Q_RM)
        if failed:
            return None
        step_MM = lapack.dtrtri(R_MM)[0]
        Q_RM, inv_MM = Q_RM @ step_MM, inv_MM @ step_MM
    return Q_RM, inv_MM
