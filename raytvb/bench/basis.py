"""Benchmark of `fit_basis` and the published fit, on the same Gram matrix in one process.

Zeng et al., "Task Vector Bases", TMLR 2026, arXiv 2502.01015. The vectors are random with D = 20 T.
Losses are fractions of ‖V‖², the sum of the squared norms of the vectors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from raytvb.bench.measure import CPU, Machine, Result, torch_threads, versions, without_nulls
from raytvb.maths.basis_fit import fit_basis
from raytvb.maths.basis_registry import BASIS_METHODS
from raytvb.storage.contract import Contract, JsonObject

KINDS = ("clustered", "orthogonal", "positive")
CURVE_METHODS = ("ae", "ae-anchored", "svd")


class PublishedFit(Contract):
    """The authors' fit."""

    algorithm: str = "joint Adam on the logits of B and W in float32 (authors' code)"
    seconds: float
    loss: float
    steps: int


class OurFit(Contract):
    """`fit_basis`."""

    algorithm: str
    """The basis method."""
    seconds: float
    loss: float
    condition: float
    """Condition number of BᵀGB with unit columns."""
    repeats: int


class CurveFit(Contract):
    """Our fit of one basis method at one number of tasks."""

    seconds: float
    loss_over_floor: float
    condition: float


class CurvePoint(Contract):
    """Our fits of T/4 vectors at one number of tasks."""

    tasks: int
    size: int
    fits: dict[str, CurveFit]
    """By basis method."""

    def to_json(self) -> JsonObject:
        """One flat object, with an entry for each basis method next to the numbers."""
        fields: JsonObject = {"tasks": self.tasks, "size": self.size}
        for method, fit in self.fits.items():
            fields[method] = fit.to_json()
        return fields


class BasisResult(Result):
    """Seconds and losses of two fits to one Gram matrix."""

    tasks: int
    size: int
    kind: str
    scale: float
    seed: int
    floor: float
    """The least loss of any `size` vectors."""
    floor_reachable: bool
    """Whether convex combinations are known to reach the floor."""
    reference: PublishedFit
    ours: OurFit
    loss_ratio: float
    """The published fit's loss divided by ours."""
    curve: tuple[CurvePoint, ...] | None = None

    def to_json(self) -> JsonObject:
        """The fields, without `curve` if the request had none."""
        return without_nulls(super().to_json(), "curve")


def bench_basis(
    tasks: int = 20,
    size: int | None = None,
    *,
    kind: str = "clustered",
    scale: float = 1.0,
    seed: int = 0,
    method: str = "ae",
    repeats: int = 5,
    curve: Sequence[int] = (),
    threads: int = 1,
    steps: int = 6000,
) -> BasisResult:
    """Time the published fit once, and our fit `repeats` times after a run that is not counted.

    The seconds of our fit are the median.

    Args:
        tasks: T, the number of random vectors.
        size: M; None is T/2.
        kind: how the vectors lie, one of KINDS.
        scale: factor on the Gram matrix.
        method: basis method of our fit.
        curve: numbers of tasks T at which our fits of T/4 vectors are timed, without the published
            fit.
        steps: number of steps of the published fit.

    Raises ValueError for an unknown kind or basis method, and for a size that is not below T.
    """
    BASIS_METHODS.lookup(method)  # an unknown basis method raises before any work
    size = max(1, tasks // 2) if size is None else size
    if not 1 <= size < tasks:
        raise ValueError(f"basis size must be from 1 to {tasks - 1} for {tasks} tasks, got {size}")
    with torch_threads(threads):
        G_TT = scale * random_gram(kind, tasks, seed)
        ours, floor = _our_fit(G_TT, size, method, repeats)
        reference = _timed_published(G_TT, size, steps, seed)
        points = tuple(_curve_point(count, kind, seed) for count in curve)
    return BasisResult(
        benchmark="basis",
        tasks=tasks,
        size=size,
        kind=kind,
        scale=scale,
        seed=seed,
        floor=floor,
        floor_reachable=floor_is_reachable(G_TT, size),
        reference=reference,
        ours=ours,
        ratio=reference.seconds / ours.seconds,
        loss_ratio=reference.loss / ours.loss,
        curve=points or None,
        machine=Machine.this(CPU, threads),
        versions=versions(),
    )


def _our_fit(G_TT: Tensor, size: int, method: str, repeats: int) -> tuple[OurFit, float]:
    """Our fit, and the floor. The first run is not counted, for it also imports libraries."""
    fits = [fit_basis(G_TT, size, method=method) for _ in range(repeats + 1)][1:]
    ours = OurFit(
        algorithm=method,
        seconds=median(fit.seconds for fit in fits),
        loss=fits[0].loss,
        condition=fits[0].condition,
        repeats=repeats,
    )
    return ours, fits[0].floor


def _timed_published(G_TT: Tensor, size: int, steps: int, seed: int) -> PublishedFit:
    started = time.perf_counter()
    B_TM, W_MT = published_fit(G_TT, size, steps=steps, seed=seed)
    seconds = time.perf_counter() - started
    return PublishedFit(seconds=seconds, loss=true_loss(G_TT, B_TM, W_MT), steps=steps)


def _curve_point(tasks: int, kind: str, seed: int) -> CurvePoint:
    size = max(1, tasks // 4)
    G_TT = random_gram(kind, tasks, seed)
    fits = {}
    for method in CURVE_METHODS:
        fit = fit_basis(G_TT, size, method=method)
        fits[method] = CurveFit(
            seconds=fit.seconds, loss_over_floor=fit.loss / fit.floor, condition=fit.condition
        )
    return CurvePoint(tasks=tasks, size=size, fits=fits)


def published_fit(G_TT: Tensor, size: int, *, steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """B (T, M) and W (M, T), float32, by the algorithm of the authors' code.

    B = softmax(A / τ) over the tasks, τ = 5; Adam on A and W together, from normal A and W = 0, on
    tr((B W − I)ᵀ G (B W − I)) / T² with G as it is; weight decay 1e-6, gradients clipped to norm 1.
    """
    tasks = len(G_TT)
    gram = G_TT.float()
    identity = torch.eye(tasks)
    A_TM = torch.randn(tasks, size, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    W_MT = torch.zeros(size, tasks, requires_grad=True)
    optimizer = torch.optim.Adam([A_TM, W_MT], lr=0.01, weight_decay=1e-6)
    for _ in range(steps):
        error_TT = (A_TM / 5).softmax(0) @ W_MT - identity
        loss = (error_TT * (gram @ error_TT)).sum() / tasks**2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([A_TM, W_MT], 1.0)
        optimizer.step()
    return (A_TM.detach() / 5).softmax(0), W_MT.detach()


def true_loss(G_TT: Tensor, B_TM: Tensor, W_MT: Tensor) -> float:
    """tr((B W − I)ᵀ G (B W − I)) / tr(G) in float64."""
    error_TT = B_TM.double() @ W_MT.double() - torch.eye(len(G_TT), dtype=torch.float64)
    return float((error_TT * (G_TT.double() @ error_TT)).sum() / G_TT.double().trace())


def random_gram(kind: str, tasks: int, seed: int) -> Tensor:
    """G (T, T) float64 of random vectors with D = 20 T entries.

    kind: `orthogonal` is unit noise. `positive` adds a common mean to unit noise. `clustered` is
    noise half as large around T/5 centres.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of vectors {kind!r}; there are: {', '.join(KINDS)}")
    rng = np.random.default_rng(seed)
    V_DT = rng.standard_normal((20 * tasks, tasks))
    if kind == "positive":
        V_DT += rng.standard_normal((20 * tasks, 1))
    if kind == "clustered":
        clusters = max(2, tasks // 5)
        centres = rng.standard_normal((20 * tasks, clusters))
        V_DT = V_DT / 2 + centres[:, np.arange(tasks) % clusters]
    return torch.from_numpy(V_DT.T @ V_DT)


def floor_is_reachable(G_TT: Tensor, size: int) -> bool:
    """Whether the top eigenspace of G holds a strictly positive vector U a.

    If it does, convex combinations can reach the floor. Solved as a linear program: maximise s with
    U a ≥ s and sum(U a) = 1.
    """
    U_TM = np.linalg.eigh((G_TT / G_TT.trace()).double().numpy())[1][:, -size:]
    solution = linprog(
        np.append(np.zeros(size), -1),
        A_ub=np.hstack([-U_TM, np.ones((len(U_TM), 1))]),
        b_ub=np.zeros(len(U_TM)),
        A_eq=np.append(U_TM.sum(0), 0)[None],
        b_eq=[1],
        bounds=(None, None),
    )
    return bool(solution.status == 0 and solution.x[-1] > 1e-9)
