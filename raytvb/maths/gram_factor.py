"""The Gram matrix as the basis methods use it: checked, divided by its trace, factored once.

`GramFactor` is what a basis method sees. Shape suffixes as in `basis_fit`. Everything is float64 on
the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from scipy.linalg import qr
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


class GramFactor:
    """What a basis method knows of the T task vectors V: G = VᵀV and its factor, computed once.

    Attributes, all float64:
        G_TT: the Gram matrix, divided by its trace.
        rank: R, the numerical rank of G.
        F_RT: the factor of G: G = FᵀF with F Fᵀ diagonal and falling. ‖F x‖ = ‖V x‖ / ‖V‖, so the
            columns of F can stand in for the task vectors.
        energy_R: the eigenvalues of G above zero, falling. They are the diagonal of F Fᵀ. The loss
            of M vectors is at least the sum of all but the first M.
        U_TR: the eigenvectors of these eigenvalues.
        null_TK: the other eigenvectors, K = T − R. They are orthonormal, and V times each is zero.
        inverse_TR: F⁺, so that V F⁺ has orthonormal columns (up to the scale).
    """

    def __init__(self, gram: Tensor) -> None:
        """gram: (T, T), any real dtype.

        Raises ValueError unless it is the Gram matrix of vectors that are not all zero.
        """
        G_TT = semidefinite(gram, "gram")
        values, U_TT = eigh(G_TT)
        check_semidefinite(values, "gram")
        tasks, values, self.G_TT = len(G_TT), values / G_TT.trace(), G_TT / G_TT.trace()
        self.rank = min(_rank(G_TT), int((values > tasks * EPS * values[0]).sum()))
        self.U_TR = U_TT[:, : self.rank]
        self.null_TK = U_TT[:, self.rank :]
        root_R = values[: self.rank].sqrt()
        self.F_RT = root_R[:, None] * self.U_TR.T
        self.inverse_TR = self.U_TR / root_R
        self.energy_R = values[: self.rank]

    def weights(self, B_TM: Tensor) -> Tensor:
        """The W (M, T) of least loss for a B (T, M)."""
        return least_squares(self.F_RT, B_TM)

    def subset(self, tasks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The basis of M of the vectors themselves: B (T, M) and its best W (M, T)."""
        B_TM = torch.eye(len(self.G_TT), dtype=torch.float64)[:, list(tasks)]
        return B_TM, self.weights(B_TM)

    def loss(self, B_TM: Tensor, W_MT: Tensor) -> float:
        """L(B, W), a fraction of ‖V‖²."""
        error_RT = self.F_RT @ B_TM @ W_MT - self.F_RT
        return float(error_RT.square().sum() / self.F_RT.square().sum())

    def floor(self, size: int) -> float:
        """The least loss that `size` vectors can have."""
        return float(self.energy_R[size:].sum())

    def inside(self, columns_TK: Tensor) -> Tensor:
        """Orthonormal basis (T, K′) of all b with V b in the span of V times these columns."""
        basis: Tensor = torch.linalg.qr(torch.cat([columns_TK, self.null_TK], 1))[0]
        return basis

    @cached_property
    def pivots(self) -> list[int]:
        """R tasks, chosen one after the other: always the vector that those before explain worst.

        These are the pivots of a column-pivoted Cholesky factorisation of G.
        """
        return [int(t) for t in qr(self.F_RT.numpy(), mode="r", pivoting=True)[1][: self.rank]]

    @cached_property
    def beside_mean(self) -> tuple[Tensor, Tensor]:
        """The best directions beside the mean: their energies (R,), falling, and columns C (T, R).

        The columns of V C are orthonormal (up to the scale). Those with an energy above zero are
        orthogonal to the mean.
        """
        f_R = self.F_RT.mean(dim=1)
        energy_RR = self.energy_R.diag()
        # Any basis reproduces a mean of zero, so such a mean uses up no direction.
        if f_R.norm() > len(self.G_TT) * EPS * self.F_RT.norm():
            f_R = f_R / f_R.norm()
            left_RR = torch.eye(self.rank, dtype=torch.float64) - torch.outer(f_R, f_R)
            energy_RR = left_RR @ energy_RR @ left_RR
        values, Y_RR = eigh((energy_RR + energy_RR.T) / 2)
        return values, self.inverse_TR @ Y_RR

    @cached_property
    def centred(self) -> Tensor:
        """Eigenvectors (T, T) of the Gram matrix of the vectors minus their mean."""
        G_TT = self.G_TT
        return eigh(G_TT - G_TT.mean(0) - G_TT.mean(1, keepdim=True) + G_TT.mean())[1]


def _rank(G_TT: Tensor) -> int:
    """Numerical rank of G. It is judged on the cosines between the vectors, so that it does not
    depend on the lengths of the vectors.
    """
    norm_T = G_TT.diag().clamp(min=0).sqrt()
    nonzero = norm_T > 0
    norm_T, G_TT = norm_T[nonzero], G_TT[nonzero][:, nonzero]
    values = eigh(G_TT / torch.outer(norm_T, norm_T))[0]
    largest, least = float(values[0]), float(values[-1])
    noise = len(values) * EPS * largest
    if least < -1e-12 * largest:
        # The products were rounded to float32 or coarser. Eigenvalues of that size mean nothing.
        noise = max(len(values) * torch.finfo(torch.float32).eps * largest, -3 * least)
    # An eigenvalue that is only rounding may be positive too. It then lies far below the smallest
    # eigenvalue that means something.
    gap = (values[1:] < 1e-8 * largest) & (values[1:] < 1e-4 * values[:-1])
    before_gap = int(gap.int().argmax()) + 1 if gap.any() else len(values)
    return min(int((values > noise).sum()), before_gap)


def semidefinite(matrix: Tensor, name: str) -> Tensor:
    """`matrix` (T, T) as float64, exactly symmetric, with 1 as the largest entry.

    name: what messages call it. Raises ValueError if it cannot be a Gram matrix.
    """
    matrix = torch.as_tensor(matrix)
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] and len(matrix) > 0
    if not square or matrix.is_complex():
        raise ValueError(
            f"{name} must be a real square matrix, got {matrix.dtype} of shape "
            f"{tuple(matrix.shape)}"
        )
    G = matrix.detach().to("cpu", torch.float64)
    if not G.isfinite().all():
        raise ValueError(f"{name} has {int((~G.isfinite()).sum())} entries that are not finite")
    if not G.any():
        raise ValueError(f"{name} is all zero: there is nothing to fit")
    G = G / G.abs().max()  # so that no later step over- or underflows
    skew = float((G - G.T).abs().max())
    if skew > 1e-5:
        raise ValueError(f"{name} is not symmetric: entries differ by {skew:.1e} of the largest")
    return (G + G.T) / 2


def check_semidefinite(values: Tensor, name: str) -> None:
    """Raise ValueError if the least of the eigenvalues (falling) is clearly negative.

    The tolerance is wide enough for a Gram matrix that was rounded to bfloat16.
    """
    if values[-1] < -1e-3 * values[0]:
        ratio = float(values[-1] / values[0].abs())
        raise ValueError(
            f"{name} is not positive semi-definite: an eigenvalue is {ratio:.3g} of the largest"
        )


def eigh(G_TT: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (T,), falling, and eigenvectors (T, T), each with a positive largest entry."""
    values, U = torch.linalg.eigh(G_TT)
    values, U = values.flip(0), U.flip(1)
    return values, U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()


def factor(G_TT: Tensor) -> Tensor:
    """F (R, T) with G = FᵀF, rows orthogonal; eigenvalues that are only rounding are dropped."""
    values, U = eigh(G_TT)
    keep = values > len(G_TT) * EPS * values[0]
    return values[keep].sqrt()[:, None] * U[:, keep].T


def unit_columns(F_RT: Tensor, B_TM: Tensor) -> tuple[Tensor, Tensor]:
    """F B (R, M) with unit columns, and their norms (M,).

    A column that vanishes up to rounding becomes exactly zero.
    """
    X_RM = F_RT @ B_TM
    norm_M = X_RM.norm(dim=0)
    norm_M = torch.where(norm_M > 1e-12 * F_RT.norm() * B_TM.norm(dim=0), norm_M, 0.0)
    return torch.where(norm_M > 0, X_RM / norm_M, 0.0), norm_M


def least_squares(F_RT: Tensor, B_TM: Tensor) -> Tensor:
    """The W (M, T) of least loss for B (T, M), see `basis_fit.best_weights`."""
    X_RM, norm_M = unit_columns(F_RT, B_TM)
    # 1e-8: directions fainter than this are the rounding error of F, and would only blow up W.
    W_MT = torch.linalg.lstsq(X_RM, F_RT, rcond=1e-8, driver="gelsd").solution
    return torch.where(norm_M[:, None] > 0, W_MT / norm_M[:, None], 0.0)


def condition(F_RT: Tensor, B_TM: Tensor) -> float:
    """Condition number of BᵀGB with unit columns; infinite for dependent ones."""
    values = torch.linalg.svdvals(unit_columns(F_RT, B_TM)[0])
    if len(values) < B_TM.shape[1] or values[-1] <= 1e-8 * values[0]:
        return math.inf
    return float((values[0] / values[-1]) ** 2)
