"""Online task vector bases: vectors arrive a few at a time, are seen once, and at most `size` + b
are held.

Whoever holds the basis S (D×M) and new vectors N (D×b) computes the Gram matrix of the atoms A = [S
N]; `advance` turns it into the mix B′ with which S′ = A B′ is formed block by block. All tasks so
far are A P, P = blockdiag(W, I), so the refit is a basis of the atoms that weights them by how the
tasks use them:

    min over B′, C of ‖A (B′C − I) P‖² = tr((B′C − I)ᵀ G (B′C − I) Q),    G = AᵀA,  Q = P Pᵀ =
    blockdiag(WWᵀ, I),

and every code, old or new, follows by the same linear map: W′ = C P.

- `svd` is incremental SVD (Brand, "Incremental singular value decomposition of uncertain data with
  missing values", ECCV 2002): W carries the singular values, S′ is the top M left singular vectors
  of [SW N] times theirs.
- `ae` and `ae-anchored` keep every basis vector a convex combination of the task vectors as they
  came: H ≥ 0, where S = V H. With E = blockdiag(H, I), that asks E B′ ≥ 0 of a refit and not B′ ≥
  0: convex combinations of the atoms shrink into their own hull with every arrival (40 tasks, 8 or
  20 vectors: up to 9 times the floor, and condition numbers without bound). Only the span counts,
  so a basis is spread around a point b₁ with a share of every task: with c_k the top M − 1
  directions of the tasks without A b₁, b_k = b₁ + ε (c_k − 1ᵀc_k b₁) with the largest |ε| that
  keeps E b_k ≥ 0. `ae-anchored`: b₁ is the mean of all tasks, so their decoded sum is exact. `ae`:
  b₁ is that point moved into the span of the incremental SVD as far as every task keeps its share.

Shape suffixes: n tasks seen, b new, M basis vectors, K = M + b atoms. Everything is float64 on the
CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raytvb.maths.basis_fit import best_weights

ONLINE_METHODS = ("svd", "ae", "ae-anchored")


LOOKS = 16


LEAST_SHARE = 0.1
"""The first vector of `ae` has at least this part of 1/n of every task: nearer 0 there is no room
to spread.
"""


FAINT = 1e-7
"""Directions below this part of ‖A P‖ are rounding: a Gram matrix resolves norms to about 1e-8 of
the largest.
"""


@dataclass(frozen=True, eq=False)
class OnlineState:
    """What is kept of the n tasks seen so far, besides the M basis vectors S themselves."""

    method: str
    """One of ONLINE_METHODS."""
    size: int
    """The most basis vectors that are kept; M is smaller while there are fewer vectors or
    directions.
    """
    W: Tensor
    """(M, n) float64: task t comes back as Σ_m W[m, t] s_m."""
    H: Tensor
    """(n, M) float64: basis vector m is Σ_t H[t, m] τ_t of the vectors as they came: S = V H."""
    error: Tensor
    """(n,) float64: upper bound of ‖τ_t − S w_t‖. Exact when t arrives; each refit adds how far it
    moves S w_t.
    """
    norm: Tensor
    """(n,) float64: ‖τ_t‖."""

    @property
    def tasks(self) -> int:
        """n, the number of tasks seen."""
        return self.W.shape[1]


def start(method: str, size: int) -> OnlineState:
    """The state before the first vector: n = M = 0. ValueError for another method or a size below
    1.
    """
    if method not in ONLINE_METHODS:
        raise ValueError(
            f"no online basis method {method!r}; there are: {', '.join(ONLINE_METHODS)}"
        )
    if size < 1:
        raise ValueError(f"basis size must be at least 1, got {size}")
    none = torch.zeros(0, dtype=torch.float64)
    return OnlineState(method, size, W=none.view(0, 0), H=none.view(0, 0), error=none, norm=none)


def advance(state: OnlineState, gram: Tensor) -> tuple[Tensor, OnlineState]:
    """The mix B′ (K, M′) float64 with S′ = [S N] B′, and the state after the b vectors N.

    gram: (K, K), K = M + b with b ≥ 1, the Gram matrix of [S N], any real dtype. As long as all
    atoms fit into `size` their span is kept whole and no error grows; `svd` then keeps the atoms
    themselves, the others the mean instead of the first. M′ is smaller than `size` if there are
    fewer directions. The bounds allow for the rounding of the Gram matrix, which shows as up to
    1e-6 of the largest norm where the error is zero, but not for a basis that is stored in less
    than float64. ValueError for a matrix of another shape and for one that is no Gram matrix.
    """
    old = len(state.W)
    G_KK = _checked(gram, old)
    F_KK = _factor(G_KK)
    new_bb = torch.eye(len(G_KK) - old, dtype=torch.float64)
    P_Kn, E_nK = torch.block_diag(state.W, new_bb), torch.block_diag(state.H, new_bb)
    centre_K = torch.full((len(G_KK),), 1 / len(E_nK), dtype=torch.float64)
    centre_K[:old] = 0
    centre_K[: min(old, 1)] = state.tasks / len(
        E_nK
    )  # the first atom is the centre of the old tasks
    before = torch.cat([state.error, torch.zeros(len(new_bb), dtype=torch.float64)])
    if len(G_KK) <= state.size:
        B_KM = torch.eye(len(G_KK), dtype=torch.float64)
        if state.method != "svd":
            B_KM[:, 0] = centre_K
        C_MK, error = torch.linalg.inv(B_KM), before
    else:
        B_KM = _refit(state, F_KK, P_Kn, E_nK, centre_K)
        C_MK = best_weights(G_KK, B_KM) if G_KK.any() else torch.zeros_like(B_KM.T)
        error = before + (F_KK @ (B_KM @ (C_MK @ P_Kn) - P_Kn)).norm(dim=0)
    H = E_nK @ B_KM
    if state.method != "svd":
        H = H.clamp(min=0)  # −1e-17 is rounding
    norm = torch.cat([state.norm, G_KK.diag()[old:].clamp(min=0).sqrt()])
    return B_KM, OnlineState(state.method, state.size, W=C_MK @ P_Kn, H=H, error=error, norm=norm)


def arrivals(count: int, buffer: int = 1) -> list[int]:
    """Numbers of tasks after which a basis of `count` tasks, taken in `buffer` at a time, is looked
    at.

    After each time, or at 16 that are evenly spaced; the last is `count`.
    """
    times = -(-count // buffer)
    steps = min(times, LOOKS)
    return sorted({min(count, buffer * round(times * (i + 1) / steps)) for i in range(steps)})


def watched(count: int) -> list[int]:
    """Positions of the tasks that are looked at: all of up to 16, else 16 that are evenly
    spaced.
    """
    return [n - 1 for n in arrivals(count)]


def relative_bounds(state: OnlineState) -> Tensor:
    """Upper bounds (n,) of ‖τ_t − S w_t‖ / ‖τ_t‖; 0 for a zero vector, which every basis gives
    back.
    """
    return torch.where(state.norm > 0, state.error / state.norm, 0.0)


def forgetting(accuracy: Tensor) -> Tensor:
    """How far each task (T,) ends below its best earlier accuracy; negative if it ends above.

    Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018, arXiv 1801.10112,
    section 3: the maximum over the arrivals before the last, minus the last. accuracy: (N, T),
    arrivals by tasks, NaN where a task had not arrived. 0 for a task that came with the last
    arrival, NaN for one that never came.
    """
    last_T = accuracy[-1]
    never_1T = torch.full_like(accuracy[:1], -math.inf)
    best_T = torch.cat([never_1T, accuracy[:-1].nan_to_num(nan=-math.inf)]).amax(0)
    return torch.where(best_T == -math.inf, last_T, best_T) - last_T


def _checked(gram: Tensor, old: int) -> Tensor:
    """`gram` as (K, K) float64; ValueError if it is not real, square, finite and symmetric, or has
    no new vector.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or len(gram) <= old or gram.is_complex():
        raise ValueError(
            f"gram must be a real square matrix of the {old} basis vectors and at least one new vector, "
            f"got {gram.dtype} of shape {tuple(gram.shape)}"
        )
    G_KK = gram.detach().to("cpu", torch.float64)
    if not G_KK.isfinite().all():
        raise ValueError(f"gram has {int((~G_KK.isfinite()).sum())} entries that are not finite")
    if (G_KK - G_KK.T).abs().max() > 1e-5 * G_KK.abs().max():
        raise ValueError("gram is not symmetric")
    return (G_KK + G_KK.T) / 2


def _factor(G_KK: Tensor) -> Tensor:
    """F (K, K) with G = FᵀF, so that ‖A x‖ = ‖F x‖, which unlike xᵀGx cannot come out negative."""
    values, U = torch.linalg.eigh(G_KK)
    if values[0] < -1e-3 * values[-1].abs():  # wide enough for a Gram rounded to bfloat16
        raise ValueError(f"gram is not positive semi-definite: eigenvalue {float(values[0]):.3g}")
    # abs: a negative eigenvalue is rounding, as large as that of a small positive one, and a bound
    # must not ignore it.
    return values.abs().sqrt()[:, None] * U.T


def _refit(
    state: OnlineState, F_KK: Tensor, P_Kn: Tensor, E_nK: Tensor, centre_K: Tensor
) -> Tensor:
    """B′ (K, M′), M′ ≤ size, as at the top of the module."""
    X_Kn = F_KK @ P_Kn  # the tasks: ‖X x‖ = ‖A P x‖
    faint = FAINT * float(X_Kn.norm())
    svd_KM = P_Kn @ _top(X_Kn, state.size, faint)
    if state.method == "svd":
        return (
            svd_KM if svd_KM.shape[1] else P_Kn[:, :1]
        )  # all tasks are zero, and a basis has a vector
    point_K = centre_K if state.method == "ae-anchored" else _towards(centre_K, svd_KM, F_KK, E_nK)
    image_K = F_KK @ point_K
    if image_K.norm() > FAINT * F_KK.norm():  # a vanishing point is in any span
        image_K = image_K / image_K.norm()
        X_Kn = X_Kn - torch.outer(image_K, image_K @ X_Kn)
    return _spread(point_K, P_Kn @ _top(X_Kn, state.size - 1, faint), E_nK)


def _top(X_Kn: Tensor, size: int, faint: float) -> Tensor:
    """The top right singular vectors (n, ≤ size) of X: X times them are the left ones times their
    values.
    """
    _, values, Vh = torch.linalg.svd(X_Kn, full_matrices=False)
    return Vh[: min(size, int((values > faint).sum()))].T


def _towards(centre_K: Tensor, span_KM: Tensor, F_KK: Tensor, E_nK: Tensor) -> Tensor:
    """The point from `centre_K` to its projection on the span, at sum 1, as far as every task keeps
    its share.
    """
    least_squares = torch.linalg.lstsq(F_KK @ span_KM, (F_KK @ centre_K)[:, None], driver="gelsd")
    projected_K = span_KM @ least_squares.solution[:, 0]
    if projected_K.sum().abs() < FAINT:
        return centre_K
    step_K = projected_K / projected_K.sum() - centre_K
    room_n, fall_n = E_nK @ centre_K - LEAST_SHARE / len(E_nK), -(E_nK @ step_K)
    way = torch.where(fall_n > 0, room_n.clamp(min=0) / fall_n, 1.0).amin().clamp(max=1)
    return centre_K + way * step_K


def _spread(point_K: Tensor, directions_KM: Tensor, E_nK: Tensor) -> Tensor:
    """B (K, M): the point, and the point moved along each direction as far as E B ≥ 0 allows; sums
    are 1.
    """
    step_KM = directions_KM - torch.outer(point_K, directions_KM.sum(0))
    share_n1, change_nM = (E_nK @ point_K)[:, None], E_nK @ step_KM
    forth_M = torch.where(change_nM < 0, share_n1 / -change_nM, math.inf).amin(0)
    back_M = torch.where(change_nM > 0, share_n1 / change_nM, math.inf).amin(0)
    far_M = torch.where(forth_M > back_M, forth_M, -back_M)
    B_KM = torch.cat([point_K[:, None], point_K[:, None] + far_M * step_KM], 1)
    return B_KM / B_KM.sum(0)
