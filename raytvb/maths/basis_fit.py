"""Task vector bases: T task vectors become M < T basis vectors and an M×T table of coefficients.

Zeng et al., "Task Vector Bases", TMLR 2026, arXiv 2502.01015. With task vectors V (D×T) a basis is
S = V B and the vectors come back as V̂ = S W. Everything here needs only the Gram matrix G = VᵀV,
never a D-sized vector:

    L(B, W) = ‖V B W − V‖² / ‖V‖² = tr((BW − I)ᵀ G (BW − I)) / tr(G),
    best W for a given B: (BᵀGB)⁺ BᵀG.

Read this module first: it shows how to request a fit and what a fit returns. Then read
`gram_factor` (what a method knows of the vectors), `basis_registry` and the methods in
`basis_methods`. `online_basis` does the same for vectors that arrive a few at a time.

Shape suffixes: T tasks, M basis vectors, R numerical rank of G, K any number of directions; G_TT,
F_RT (G = FᵀF, F Fᵀ diagonal and falling), B_TM, W_MT. Everything is float64 on the CPU, and G is
divided by its trace first, so a fit does not depend on the scale of the vectors.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytvb.maths.basis_registry import BASIS_METHODS, BasisMethod
from raytvb.maths.gram_factor import GramFactor, condition, factor, least_squares
from raytvb.maths.method_registry import described_type

EXACT = 1e-12
"""A basis with a loss below this is exact: the loss is only rounding."""

ROUNDING = 1e-9
"""How far entries and sums of a convex basis may be off."""


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
    """The least L that any M vectors can have: the sum of all eigenvalues of G but the M largest,
    divided by tr(G). G is not centred for this, whatever the method.
    """
    condition: float
    """Condition number of BᵀGB with the columns of V B scaled to unit norm; infinite if these
    columns are linearly dependent.
    """
    seconds: float
    """Time of this fit. It includes the whole of the work that fits of several sizes share."""

    @property
    def size(self) -> int:
        """M, the number of stored vectors."""
        return self.B.shape[1]

    @property
    def convex(self) -> bool:
        """True if every basis vector is a convex combination of task vectors (to 1e-9)."""
        return bool((self.B >= -ROUNDING).all()) and bool(
            ((self.B.sum(0) - 1).abs() <= ROUNDING).all()
        )


def fit_basis(
    gram: Tensor,
    size: int,
    *,
    method: str = "ae",
    generator: torch.Generator | None = None,
) -> BasisFit:
    """Fit `size` basis vectors to the vectors whose Gram matrix is `gram`: see `fit_bases`."""
    return fit_bases(gram, [size], method=method, generator=generator)[0]


def fit_bases(
    gram: Tensor,
    sizes: Sequence[int],
    *,
    method: str = "ae",
    generator: torch.Generator | None = None,
) -> list[BasisFit]:
    """Fit a basis of each size. The eigenvectors are computed once. Each fit equals `fit_basis`'s.

    A size of T or more gives the vectors themselves. Any other size above their rank gives an exact
    basis of as few vectors as the method needs. Both cases give a warning.

    Args:
        gram: (T, T) symmetric positive semi-definite, any real dtype.
        sizes: numbers of basis vectors M, each at least 1.
        method: a name in `basis_registry.BASIS_METHODS`.
        generator: the source of every random draw. It starts from the same state for each size.
            None stands for a generator seeded with 0.

    Raises ValueError for an unknown method, a size below 1, and a Gram that is not square, finite,
    symmetric, positive semi-definite and non-zero. Raises MethodError, a ValueError, if the method
    raises an error or returns what it must not return.
    """
    entry = BASIS_METHODS.lookup(method)
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
        B_TM, W_MT = _fit(vectors, size, entry, generator)
        loss, floor = vectors.loss(B_TM, W_MT), vectors.floor(B_TM.shape[1])
        conditioned = condition(vectors.F_RT, B_TM)
        fits.append(
            BasisFit(method, B_TM, W_MT, loss, floor, conditioned, time.perf_counter() - started)
        )
    return fits


def _fit(
    vectors: GramFactor, size: int, method: BasisMethod, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """B and W of `size` basis vectors, or of fewer, with a warning, where fewer are exact."""
    tasks = len(vectors.G_TT)
    if size >= tasks:
        warnings.warn(
            f"basis size {size} is not below the {tasks} vectors: they are kept as they are",
            stacklevel=4,
        )
        return torch.eye(tasks, dtype=torch.float64), torch.eye(tasks, dtype=torch.float64)
    if size <= vectors.rank:
        return _run(vectors, size, method, generator)
    B_TM, W_MT = _exact(vectors, method, generator)
    warnings.warn(
        f"the vectors have rank {vectors.rank}: {B_TM.shape[1]} basis vectors are exact, so the "
        f"size {size} is not needed",
        stacklevel=4,
    )
    return B_TM, W_MT


def _exact(
    vectors: GramFactor, method: BasisMethod, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The smallest exact basis that the method finds. If it finds none, the basis is R of the task
    vectors themselves.
    """
    # If a method fixes a column of B, the other columns may have to explain the vectors alone.
    for enough in range(vectors.rank, vectors.rank + method.extra + 1):
        B_TM, W_MT = _run(vectors, enough, method, generator)
        if vectors.loss(B_TM, W_MT) < EXACT:
            return B_TM, W_MT
    return vectors.subset(vectors.pivots)


def _run(
    vectors: GramFactor, size: int, method: BasisMethod, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """B (T, M) and W (M, T) from the method.

    Raises MethodError if the method raises anything, returns anything but such tables of finite
    float64, returns a B that is not convex although it is registered as convex, or changes the
    vectors it was given.
    """
    before = _copies(vectors)
    result = method.run(method.fit, vectors, size, generator)
    changed = [name for name, was in before.items() if not _equal(was, getattr(vectors, name))]
    if changed:
        raise method.fault(
            f"changed {', '.join(changed)} of the vectors it was given",
            "work on a copy (tensor.clone())",
        )
    tasks = len(vectors.G_TT)
    pair = f"it must return a pair of tensors, B ({tasks}, {size}) and W ({size}, {tasks})"
    if not isinstance(result, tuple | list):
        raise method.fault(f"returned {described_type(result)}", pair)
    if len(result) != 2:
        raise method.fault(f"returned {len(result)} values", pair)
    B_TM = _checked_table(method, "B", result[0], (tasks, size))
    W_MT = _checked_table(method, "W", result[1], (size, tasks))
    if method.convex:
        _check_convex(method, B_TM)
    return B_TM, W_MT


def _copies(vectors: GramFactor) -> dict[str, object]:
    """Copies of all that the vectors hold so far, by name."""
    kinds = (Tensor, tuple, list, int)
    return {n: copy.deepcopy(v) for n, v in vars(vectors).items() if isinstance(v, kinds)}


def _equal(left: object, right: object) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    return type(left) is type(right) and left == right


def _checked_table(method: BasisMethod, name: str, table: object, shape: tuple[int, int]) -> Tensor:
    """A table that the method returned. Raises MethodError unless it is as it must be."""
    expected = f"{name} must be a float64 tensor {shape} on the CPU with finite values"
    if not isinstance(table, Tensor):
        raise method.fault(f"returned {described_type(table)} as {name}", expected)
    if table.shape != shape:
        raise method.fault(f"returned {name} of shape {tuple(table.shape)}", expected)
    if table.dtype != torch.float64 or table.device.type != "cpu" or table.is_sparse:
        layout = "sparse " if table.is_sparse else ""
        raise method.fault(
            f"returned {name} as {layout}{table.dtype} on {table.device}", f"{expected}, not sparse"
        )
    if not table.isfinite().all():
        count = int((~table.isfinite()).sum())
        raise method.fault(
            f"returned {name} with {count} entries of {table.numel()} that are NaN or infinite",
            expected,
        )
    return table.detach()


def _check_convex(method: BasisMethod, B_TM: Tensor) -> None:
    """Raise MethodError that names a column of B which is no convex combination."""
    wrong_M = ((B_TM < -ROUNDING).any(0) | ((B_TM.sum(0) - 1).abs() > ROUNDING)).tolist()
    if True in wrong_M:
        column = wrong_M.index(True)
        least, total = float(B_TM[:, column].min()), float(B_TM[:, column].sum())
        raise method.fault(
            f"is registered as convex, but column {column} of its B (counted from 0) has the least "
            f"entry {least:.10g} and the sum {total:.10g}",
            "every entry must be >= 0 and every sum 1; or register it without convex=True",
        )


def best_weights(gram: Tensor, B: Tensor) -> Tensor:
    """The W (M, T) float64 of least loss for a given B (T, M): (BᵀGB)⁺ BᵀG.

    It minimises ‖F (B W − I)‖² with G = FᵀF, by least squares on F B with its columns scaled to
    unit norm. The condition number of F B is the square root of that of BᵀGB.
    """
    return least_squares(factor(gram.double()), B.double())


def relative_loss(gram: Tensor, B: Tensor, W: Tensor) -> float:
    """L(B, W) for G (T, T), B (T, M) and W (M, T).

    Computed as ‖F (B W − I)‖² / ‖F‖² with G = FᵀF, which unlike the trace cannot come out negative.
    """
    F_RT = factor(gram.double())
    return float((F_RT @ B.double() @ W.double() - F_RT).square().sum() / F_RT.square().sum())


def task_errors(gram: Tensor, fit: BasisFit) -> Tensor:
    """Relative squared error ‖S w_t − τ_t‖² / ‖τ_t‖² of each task (T,) float64.

    It is 0 for a zero vector.
    """
    rest = fit.B @ fit.W - torch.eye(len(gram), dtype=torch.float64)
    error, norm = (rest * (gram.double() @ rest)).sum(dim=0).clamp(min=0), gram.double().diagonal()
    return torch.where(norm > 0, error / norm.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
