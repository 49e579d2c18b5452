"""Online task vector bases: vectors arrive a few at a time, each is seen once, and at most
`size` + b of them are held.

The caller holds the basis S (D×M) and the new vectors N (D×b), and computes the Gram matrix of the
atoms A = [S N]. `advance` turns this matrix into the mix B′ and the next state. The caller then
forms S′ = A B′ block by block. All coefficients, old or new, follow by the same linear map,
W′ = C P, with P = blockdiag(W, I) and C the best weights of the atoms for B′. The online form of a
basis method (see `basis_registry`) chooses B′; `online_refit` has the maths.

Read `OnlineState` first, then `start` and `advance`. The other functions measure a stream.

Shape suffixes: n tasks seen, b new, M basis vectors, K = M + b atoms. Everything is float64 on the
CPU.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raytvb.maths.basis_fit import best_weights
from raytvb.maths.basis_registry import BASIS_METHODS, BasisMethod, online_methods
from raytvb.maths.method_registry import described_type
from raytvb.maths.online_refit import Atoms

if TYPE_CHECKING:
    from raytvb.maths.basis_registry import Refit

LOOKS = 16
"""A basis is measured at most this many times during a stream."""


@dataclass(frozen=True, eq=False)
class OnlineState:
    """The state after n tasks: all that is kept of them except the M basis vectors S."""

    method: str
    """A basis method that has an online form."""
    size: int
    """The largest number of basis vectors. M is smaller while there are fewer task vectors or
    directions.
    """
    W: Tensor
    """(M, n) float64: task t comes back as Σ_m W[m, t] s_m."""
    H: Tensor
    """(n, M) float64: basis vector m is Σ_t H[t, m] τ_t, with the task vectors as they arrived:
    S = V H.
    """
    error: Tensor
    """(n,) float64: upper bound of ‖τ_t − S w_t‖. The bound is exact when t arrives. Each refit
    adds the distance by which it moves S w_t.
    """
    norm: Tensor
    """(n,) float64: ‖τ_t‖."""

    @property
    def tasks(self) -> int:
        """n, the number of tasks seen."""
        return self.W.shape[1]


def start(method: str, size: int) -> OnlineState:
    """The state before the first vector: n = M = 0.

    Raises ValueError for a method without an online form, and for a size below 1.
    """
    _online_form(method)
    if size < 1:
        raise ValueError(f"basis size must be at least 1, got {size}")
    none = torch.zeros(0, dtype=torch.float64)
    return OnlineState(method, size, W=none.view(0, 0), H=none.view(0, 0), error=none, norm=none)


def _online_form(method: str) -> tuple[BasisMethod, Refit]:
    """The method with its online form; ValueError where it has none."""
    entry = BASIS_METHODS.lookup(method)
    if entry.online is None:
        raise ValueError(
            f"basis method {method!r} has no online form; those that have one: "
            f"{', '.join(online_methods())}"
        )
    return entry, entry.online


def advance(state: OnlineState, gram: Tensor) -> tuple[Tensor, OnlineState]:
    """The mix B′ (K, M′) float64 with S′ = [S N] B′, and the state after the b vectors N.

    gram: (K, K), K = M + b with b ≥ 1, the Gram matrix of [S N], any real dtype.

    As long as all atoms fit into `size`, their span is kept whole and no error grows. A convex
    basis then has the mean of all tasks in place of the first atom; any other basis is the atoms
    themselves. M′ is smaller than `size` if there are fewer directions.

    The error bounds allow for the rounding of the Gram matrix: where the error is zero, they may be
    up to 1e-6 of the largest norm. They do not allow for the rounding of a basis that is stored
    with less precision than float64.

    Raises ValueError for a matrix of another shape, and for a matrix that is not a Gram matrix.
    Raises MethodError, a ValueError, if the method's refit raises an error or returns what it must
    not return.
    """
    old = len(state.W)
    method, refit = _online_form(state.method)
    G_KK = _checked(gram, old)
    atoms = _atoms(state, _factor(G_KK))
    error_n = torch.cat([state.error, torch.zeros(len(G_KK) - old, dtype=torch.float64)])
    if len(G_KK) <= state.size:
        B_KM = torch.eye(len(G_KK), dtype=torch.float64)
        if method.convex:
            B_KM[:, 0] = atoms.centre
        C_MK = torch.linalg.inv(B_KM)
    else:
        B_KM = method.run(refit, atoms, state.size)
        _check_mix(method, B_KM, len(G_KK), state.size)
        C_MK = best_weights(G_KK, B_KM) if G_KK.any() else torch.zeros_like(B_KM.T)
        moved_Kn = B_KM @ (C_MK @ atoms.P_Kn) - atoms.P_Kn
        error_n = error_n + (atoms.F_KK @ moved_Kn).norm(dim=0)
    H_nM = atoms.E_nK @ B_KM
    if method.convex:
        _check_share(method, H_nM)
        H_nM = H_nM.clamp(min=0)  # entries like −1e-17 are rounding
    norm_n = torch.cat([state.norm, G_KK.diag()[old:].clamp(min=0).sqrt()])
    W_Mn = C_MK @ atoms.P_Kn
    return B_KM, OnlineState(state.method, state.size, W=W_Mn, H=H_nM, error=error_n, norm=norm_n)


def _check_mix(method: BasisMethod, B_KM: object, atoms: int, size: int) -> None:
    """Raise MethodError unless a refit returned a mix (K, at most `size`) of finite float64."""
    expected = f"the result must be a float64 tensor ({atoms}, at most {size}), finite"
    if not isinstance(B_KM, Tensor):
        raise method.fault(f"(its online form) returned {described_type(B_KM)}", expected)
    fits = B_KM.ndim == 2 and len(B_KM) == atoms and B_KM.shape[1] <= size
    if not fits or B_KM.dtype != torch.float64:
        raise method.fault(
            f"(its online form) returned {B_KM.dtype} of shape {tuple(B_KM.shape)}", expected
        )
    if not B_KM.isfinite().all():
        raise method.fault("(its online form) returned values that are NaN or infinite", expected)


def _check_share(method: BasisMethod, H_nM: Tensor) -> None:
    """Raise MethodError if a convex basis has a negative share of a task, beyond rounding."""
    if (H_nM < -1e-6).any():
        raise method.fault(
            f"is registered as convex, but its online form returned a basis with the share "
            f"{float(H_nM.min()):.3g} of a task",
            "every share must be >= 0; or register it without convex=True",
        )


def _atoms(state: OnlineState, F_KK: Tensor) -> Atoms:
    """The old basis vectors and the new vectors, whose Gram matrix is FᵀF, for a refit."""
    old = len(state.W)
    new_bb = torch.eye(len(F_KK) - old, dtype=torch.float64)
    E_nK = torch.block_diag(state.H, new_bb)
    tasks = len(E_nK)
    centre_K = torch.full((len(F_KK),), 1 / tasks, dtype=torch.float64)
    centre_K[:old] = 0
    centre_K[: min(old, 1)] = state.tasks / tasks  # the first atom is the mean of the old tasks
    return Atoms(F_KK, torch.block_diag(state.W, new_bb), E_nK, centre_K)


def arrivals(count: int, buffer: int = 1) -> list[int]:
    """Numbers of tasks after which an online basis is measured.

    The `count` tasks arrive `buffer` at a time. The basis is measured after every arrival, or after
    16 evenly spaced arrivals if there are more. The last number is `count`.
    """
    times = -(-count // buffer)
    steps = min(times, LOOKS)
    return sorted({min(count, buffer * round(times * (i + 1) / steps)) for i in range(steps)})


def stored_arrivals(stored: Collection[int], count: int, buffer: int = 1) -> list[int]:
    """The numbers of tasks out of `stored` that stand for `arrivals`, as far as they have come.

    A number that is not stored, since more tasks came than were expected at first, is replaced by
    the next smaller one.
    """
    numbers: set[int] = set()
    for wanted in arrivals(count, buffer):
        if wanted <= max(stored, default=0):
            numbers.update(sorted(number for number in stored if number <= wanted)[-1:])
    return sorted(numbers)


def watched(count: int) -> list[int]:
    """Positions of the tasks that are measured during a stream: all if there are at most 16, else
    16 that are evenly spaced.
    """
    return [n - 1 for n in arrivals(count)]


def relative_bounds(state: OnlineState) -> Tensor:
    """Upper bounds (n,) of ‖τ_t − S w_t‖ / ‖τ_t‖; 0 for a zero vector, which no basis changes."""
    return torch.where(state.norm > 0, state.error / state.norm, 0.0)


def forgetting(accuracy: Tensor) -> Tensor:
    """How far each task (T,) ends below its best earlier accuracy; negative if it ends above.

    Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018, arXiv 1801.10112,
    section 3: the maximum over the arrivals before the last, minus the last.

    accuracy: (N, T), arrivals by tasks, NaN where a task had not arrived. The result is 0 for a
    task that came with the last arrival, and NaN for a task that never came.
    """
    last_T = accuracy[-1]
    never_1T = torch.full_like(accuracy[:1], -math.inf)
    best_T = torch.cat([never_1T, accuracy[:-1].nan_to_num(nan=-math.inf)]).amax(0)
    return torch.where(best_T == -math.inf, last_T, best_T) - last_T


def _checked(gram: Tensor, old: int) -> Tensor:
    """`gram` as (K, K) float64, exactly symmetric.

    Raises ValueError if it is not real, square, finite and symmetric, or has no new vector.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or len(gram) <= old or gram.is_complex():
        raise ValueError(
            f"gram must be a real square matrix of the {old} basis vectors and at least one new "
            f"vector, got {gram.dtype} of shape {tuple(gram.shape)}"
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
    F_KK: Tensor = values.abs().sqrt()[:, None] * U.T
    return F_KK
