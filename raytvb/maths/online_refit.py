"""The refit of an online basis: M old basis vectors and b new task vectors become at most M again.

Whoever holds the basis S (D×M) and new vectors N (D×b) knows the Gram matrix of the atoms
A = [S N]. All tasks so far are A P, P = blockdiag(W, I), so the refit is a basis of the atoms that
weights them by how the tasks use them:

    min over B′, C of ‖A (B′C − I) P‖² = tr((B′C − I)ᵀ G (B′C − I) Q),
    G = AᵀA,  Q = P Pᵀ = blockdiag(WWᵀ, I).

The unconstrained answer is incremental SVD (`Atoms.principal`): the top left singular vectors of
A P, times their values.

In a convex basis every basis vector is a convex combination of the task vectors as they came:
S = V H with H ≥ 0. With E = blockdiag(H, I), that asks E B′ ≥ 0 of a refit and not B′ ≥ 0: convex
combinations of the atoms shrink into their own hull with every arrival (40 tasks, 8 or 20 vectors:
up to 9 times the floor, and condition numbers without bound). Only the span counts, so the basis is
spread around a point b₁ with a share of every task (`spread_around`): with c_k the top M − 1
directions of the tasks without A b₁,

    b_k = b₁ + ε (c_k − 1ᵀc_k b₁)

with the largest |ε| that keeps E b_k ≥ 0. `ae-anchored` takes the mean of all tasks as b₁, so that
their decoded sum is exact. `ae` moves that point towards the span of the incremental SVD as far as
every task keeps its share (`moved_towards`).

Shape suffixes: n tasks seen, b new, M basis vectors, K = M + b atoms. Everything is float64 on the
CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LEAST_SHARE = 0.1
"""The first vector of `ae` has at least this part of 1/n of every task: nearer to 0 there is no
room to spread.
"""

FAINT = 1e-7
"""Directions below this part of ‖A P‖ are rounding: a Gram matrix resolves norms to about 1e-8 of
the largest.
"""


@dataclass(frozen=True, eq=False)
class Atoms:
    """The atoms A = [S N] of a refit, and how the n tasks so far use them."""

    F_KK: Tensor
    """(K, K) ‖A x‖ = ‖F x‖: a factor of the Gram matrix of the atoms, G = FᵀF."""
    P_Kn: Tensor
    """The tasks, decoded: A P."""
    E_nK: Tensor
    """The atoms, as combinations of the task vectors as they came: A = V E."""
    centre: Tensor
    """(K,) A times this is the mean of all task vectors, where the first atom is the mean of the
    old ones.
    """

    @cached_property
    def tasks(self) -> Tensor:
        """X (K, n) = F P, which stands for the decoded tasks: ‖X x‖ = ‖A P x‖."""
        return self.F_KK @ self.P_Kn

    @property
    def faint(self) -> float:
        """Singular values of the tasks up to this are rounding."""
        return FAINT * float(self.tasks.norm())

    def principal(self, size: int) -> Tensor:
        """The mix (K, at most size) of incremental SVD; fewer columns where there are fewer
        directions.
        """
        return self.P_Kn @ _top(self.tasks, size, self.faint)


def moved_towards(atoms: Atoms, span_KM: Tensor) -> Tensor:
    """The point (K,) from the mean of all tasks towards its projection on a span.

    It is moved as far as every task keeps its least share, on the plane where the sum is 1. A span
    without columns, or whose projection has no sum, leaves the mean.
    """
    image_K1 = (atoms.F_KK @ atoms.centre)[:, None]
    least_squares = torch.linalg.lstsq(atoms.F_KK @ span_KM, image_K1, driver="gelsd")
    projected_K = span_KM @ least_squares.solution[:, 0]
    if projected_K.sum().abs() < FAINT:
        return atoms.centre
    step_K = projected_K / projected_K.sum() - atoms.centre
    room_n = atoms.E_nK @ atoms.centre - LEAST_SHARE / len(atoms.E_nK)
    fall_n = -(atoms.E_nK @ step_K)
    fraction_n = torch.where(fall_n > 0, room_n.clamp(min=0) / fall_n, 1.0)
    return atoms.centre + fraction_n.amin().clamp(max=1) * step_K


def spread_around(atoms: Atoms, point_K: Tensor, size: int) -> Tensor:
    """The mix (K, at most size): the point, and size − 1 points around it, all convex in the tasks.

    The others lie in the top directions of what the tasks have beside the point.
    """
    X_Kn = atoms.tasks
    image_K = atoms.F_KK @ point_K
    if image_K.norm() > FAINT * atoms.F_KK.norm():  # a vanishing point is in any span
        image_K = image_K / image_K.norm()
        X_Kn = X_Kn - torch.outer(image_K, image_K @ X_Kn)
    return _spread(point_K, atoms.P_Kn @ _top(X_Kn, size - 1, atoms.faint), atoms.E_nK)


def _spread(point_K: Tensor, directions_KM: Tensor, E_nK: Tensor) -> Tensor:
    """B (K, M): the point, and the point moved along each direction as far as E B ≥ 0 allows.

    Every column has the sum 1.
    """
    step_KM = directions_KM - torch.outer(point_K, directions_KM.sum(0))
    share_n1, change_nM = (E_nK @ point_K)[:, None], E_nK @ step_KM
    forth_M = torch.where(change_nM < 0, share_n1 / -change_nM, math.inf).amin(0)
    back_M = torch.where(change_nM > 0, share_n1 / change_nM, math.inf).amin(0)
    far_M = torch.where(forth_M > back_M, forth_M, -back_M)
    B_KM = torch.cat([point_K[:, None], point_K[:, None] + far_M * step_KM], 1)
    return B_KM / B_KM.sum(0)


def _top(X_Kn: Tensor, size: int, faint: float) -> Tensor:
    """The top right singular vectors (n, at most size) of X, without those of values up to `faint`.

    X times them are the left singular vectors times their values.
    """
    _, values, Vh = torch.linalg.svd(X_Kn, full_matrices=False)
    return Vh[: min(size, int((values > faint).sum()))].T
