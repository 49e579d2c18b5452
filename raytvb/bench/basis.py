"""Benchmark of `fit_basis`: beside the published fit on the same Gram matrix, in one process.

Zeng et al., "Task Vector Bases", TMLR 2026, arXiv 2502.01015. The vectors are random with D = 20 T;
the figures of the result are fractions of ‖V‖², and `ratio` is the published fit's seconds divided
by ours.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from raytvb.bench.measure import machine, versions
from raytvb.maths.basis_fit import BasisFit, fit_basis
from raytvb.maths.basis_methods import METHODS

KINDS = ("clustered", "orthogonal", "positive")


CURVE_METHODS = ("ae", "ae-anchored", "svd")


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
) -> dict[str, Any]:
    """Seconds and losses of the published fit (once) and of ours (median of `repeats` after one
    that is not counted).

    size: None is T/2. kind: one of KINDS. scale: the Gram is multiplied by it. curve: numbers of
    tasks at which our fits of T/4 vectors are timed without the published one.
    """
    if method not in METHODS:
        raise ValueError(
            f"unknown basis method {method!r}; there are: {', '.join(sorted(METHODS))}"
        )
    size = max(1, tasks // 2) if size is None else size
    if not 1 <= size < tasks:
        raise ValueError(f"basis size must be from 1 to {tasks - 1} for {tasks} tasks, got {size}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        G_TT = scale * random_gram(kind, tasks, seed)
        fits = [fit_basis(G_TT, size, method=method) for _ in range(repeats + 1)][1:]
        seconds = median(fit.seconds for fit in fits)
        started = time.perf_counter()
        B_TM, W_MT = published_fit(G_TT, size, steps=steps, seed=seed)
        published_s = time.perf_counter() - started
        points = [_curve_point(other, kind, seed) for other in curve]
    finally:
        torch.set_num_threads(before)
    published_loss = true_loss(G_TT, B_TM, W_MT)
    return (
        {
            "benchmark": "basis",
            "tasks": tasks,
            "size": size,
            "kind": kind,
            "scale": scale,
            "seed": seed,
            "floor": fits[0].floor,
            "floor_reachable": floor_is_reachable(G_TT, size),
            "reference": {
                "algorithm": "joint Adam on the logits of B and W in float32 (authors' code)",
                "seconds": published_s,
                "loss": published_loss,
                "steps": steps,
            },
            "ours": {
                "algorithm": method,
                "seconds": seconds,
                "loss": fits[0].loss,
                "condition": fits[0].condition,
                "repeats": repeats,
            },
            "ratio": published_s / seconds,
            "loss_ratio": published_loss / fits[0].loss,
        }
        | ({"curve": points} if points else {})
        | {"machine": machine(torch.device("cpu"), threads), "versions": versions()}
    )


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
    """G (T, T) float64 of vectors of unit noise alone, with a common mean, or half as large around
    T/5 centres.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of vectors {kind!r}; there are: {', '.join(KINDS)}")
    rng = np.random.default_rng(seed)
    V_DT = rng.standard_normal((20 * tasks, tasks))
    if kind == "positive":
        V_DT += rng.standard_normal((20 * tasks, 1))
    if kind == "clustered":
        clusters = max(2, tasks // 5)
        V_DT = (
            V_DT / 2 + rng.standard_normal((20 * tasks, clusters))[:, np.arange(tasks) % clusters]
        )
    return torch.from_numpy(V_DT.T @ V_DT)


def floor_is_reachable(G_TT: Tensor, size: int) -> bool:
    """Whether the top eigenspace holds a strictly positive vector U a: max s with U a ≥ s, sum(U a)
    = 1 (enough).
    """
    U_TM = np.linalg.eigh((G_TT / G_TT.trace()).double().numpy())[1][:, -size:]
    found = linprog(
        np.append(np.zeros(size), -1),
        A_ub=np.hstack([-U_TM, np.ones((len(U_TM), 1))]),
        b_ub=np.zeros(len(U_TM)),
        A_eq=np.append(U_TM.sum(0), 0)[None],
        b_eq=[1],
        bounds=(None, None),
    )
    return bool(found.status == 0 and found.x[-1] > 1e-9)


def _curve_point(tasks: int, kind: str, seed: int) -> dict[str, Any]:
    size = max(1, tasks // 4)
    G_TT = random_gram(kind, tasks, seed)
    fits: dict[str, BasisFit] = {
        method: fit_basis(G_TT, size, method=method) for method in CURVE_METHODS
    }
    return {"tasks": tasks, "size": size} | {
        method: {
            "seconds": fit.seconds,
            "loss_over_floor": fit.loss / fit.floor,
            "condition": fit.condition,
        }
        for method, fit in fits.items()
    }
