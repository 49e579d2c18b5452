"""The refit of an online basis: M old basis vectors and b new task vectors become at most M again.

The caller holds the basis S (D×M) and the new vectors N (D×b), and so knows the Gram matrix of the
atoms A = [S N]. All tasks so far decode to A P with P = blockdiag(W, I). So the refit is a basis of
the atoms, weighted by how the tasks use them:

    min over B′, C of ‖A (B′C − I) P‖² = tr((B′C − I)ᵀ G (B′C − I) Q),
    G = AᵀA,  Q = P Pᵀ = blockdiag(WWᵀ, I).

The unconstrained answer is incremental SVD (`Atoms.principal`): the top left singular vectors of
A P, times their singular values.

In a convex basis every basis vector is a convex combination of the task vectors as they arrived:
S = V H with H ≥ 0. With E = blockdiag(H, I), a refit must therefore keep E B′ ≥ 0. It need not keep
B′ ≥ 0, and should not: convex combinations of the atoms shrink into their own hull with every
arrival. (With 40 tasks and 8 or 20 basis vectors, the loss was up to 9 times the floor, and
condition numbers grew without bound.)

Only the span counts. So the basis is spread around a point b₁ that has a share of every task
(`spread_around`). With c_k the top M − 1 directions of the tasks beside A b₁,

    b_k = b₁ + ε (c_k − 1ᵀc_k b₁)

with the largest |ε| that keeps E b_k ≥ 0. `ae-anchored` takes the mean of all tasks as b₁, so that
their decoded sum is exact. `ae` moves that point towards the span of the incremental SVD, as far as
it can while every task keeps its least share (`moved_towards`).

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
"""The first vector of `ae` has at least this fraction of 1/n of every task. With a smaller share
there would be no room to spread the other vectors around it.
"""

FAINT = 1e-7
"""Directions below this fraction of ‖A P‖ are rounding, since a Gram matrix resolves norms to about
1e-8 of the largest.
"""


@dataclass(frozen=True, eq=False)
class Atoms:
    """The atoms A = [S N] of a refit, and how the n tasks so far use them."""

    F_KK: Tensor
    """(K, K) ‖A x‖ = ‖F x‖: a factor of the Gram matrix of the atoms, G = FᵀF."""
    P_Kn: Tensor
    """(K, n): A P are the decoded tasks."""
    E_nK: Tensor
    """(n, K): the atoms as combinations of the task vectors as they arrived, A = V E."""
    centre: Tensor
    """(K,): A times this is the mean of all task vectors, if the first atom is the mean of the old
    ones.
    """

    @cached_property
    def tasks(self) -> Tensor:
        """X (K, n) = F P, which stands for the decoded tasks: ‖X x‖ = ‖A P x‖."""
        return self.F_KK @ self.P_Kn

    @property
    def faint(self) -> float:
        """Singular values of `tasks` up to this value are rounding."""
        return FAINT * float(self.tasks.norm())

    def principal(self, size: int) -> Tensor:
        """The mix (K, at most size) of incremental SVD; fewer columns where there are fewer
        directions.
        """
        return self.P_Kn @ _top(self.tasks, size, self.faint)


def moved_towards(atoms: Atoms, span_KM: Tensor) -> Tensor:
    """The mean of all tasks (K,), moved towards its projection on a span.

    span_KM: A times these columns spans it. The point moves on the plane where its entries sum to
    1, as far as it can while every task keeps its least share. It stays at the mean if the span has
    no columns, or if the entries of the projection sum to 0.
    """
    image_K1 = (atoms.F_KK @ atoms.centre)[:, None]
    least_squares = torch.linalg.lstsq(atoms.F_KK @ span_KM, image_K1, driver="gelsd")
    projected_K: Tensor = span_KM @ least_squares.solution[:, 0]
    if projected_K.sum().abs() < FAINT:
        return atoms.centre
    step_K = projected_K / projected_K.sum() - atoms.centre
    room_n = atoms.E_nK @ atoms.centre - LEAST_SHARE / len(atoms.E_nK)
    fall_n = -(atoms.E_nK @ step_K)
    fraction_n = torch.where(fall_n > 0, room_n.clamp(min=0) / fall_n, 1.0)
    return atoms.centre + fraction_n.amin().clamp(max=1) * step_K


def spread_around(atoms: Atoms, point_K: Tensor, size: int) -> Tensor:
    """The mix (K, at most size): the point (K,), and up to size − 1 points around it.

    All are convex combinations of the task vectors. The points around it lie in the top directions
    of what the tasks have beside the point.
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
    """The top right singular vectors (n, at most size) of X, of singular values above `faint`.

    X times these vectors gives the left singular vectors times their singular values.
    """
    _, values, Vh = torch.linalg.svd(X_Kn, full_matrices=False)
    top: Tensor = Vh[: min(size, int((values > faint).sum()))].T
    return top
