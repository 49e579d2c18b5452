"""The columns of `ae` and `ae-anchored`: which problems of `simplex` are solved, in which order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raytvb.maths.gram_factor import EPS, GramFactor
from raytvb.maths.simplex import BARRIER, MOST_CONDITION, Columns, SimplexProblem, best_columns

SMALL = 500
"""Entries of B up to which evaluations cost next to nothing."""

GOOD = 1.005
"""L / floor above which the columns may be in a poor local optimum."""


def least_loss_columns(vectors: GramFactor, size: int, generator: torch.Generator) -> Tensor:
    """B (T, M) with columns on the simplex and the least loss, for the best W.

    The loss depends only on the span of V B. So the solver asks only for B ≥ 0, and the columns are
    scaled at the end.

    If the best possible span holds a strictly positive combination, it holds M independent ones.
    The floor is then reached exactly, and the columns are chosen for their condition number alone.
    If that number stays above MOST_CONDITION, as with a strong common mean, up to 0.2 % more loss
    is accepted to lower it. In all other cases the loss is minimised. If it ends more than 0.5 %
    above the floor, random starts are tried too, since few vectors of mixed sign have poor local
    optima.
    """
    if size == vectors.rank:
        return vectors.subset(vectors.pivots[:size])[0]
    problem = SimplexProblem(vectors, vectors.inverse_TR[:, :size], vectors.floor(size), size)
    start = problem.measured(problem.start())
    # Solving divides the condition number by about 50. If that will not be enough, the first
    # barrier is higher.
    barrier = BARRIER if start.condition < 40 * MOST_CONDITION else 6 * BARRIER
    candidates = [problem.solve(start.B_TM, barrier)]
    exact = problem.moved_inside(candidates[0].B_TM)
    if exact is not None:
        candidates.append(exact)
    best = _better_conditioned(problem, candidates, barrier)
    if best.ratio > _satisfying_ratio(best, exact is not None):
        best = _search(problem, candidates, generator)
    return best.B_TM


def _better_conditioned(
    problem: SimplexProblem, candidates: list[Columns], barrier: float
) -> Columns:
    """The best of the candidates, after up to three solves with higher barriers.

    The solves are added to the candidates. They accept up to 0.2 % more loss for a condition number
    below MOST_CONDITION.
    """
    best = best_columns(candidates)
    for _ in range(3):
        if best.condition <= MOST_CONDITION or best.ratio > 1.0014:
            break
        # The excess loss grows with the square of the barrier: this is the one that costs 0.18 %.
        barrier *= min(math.sqrt(1.8e-3 / max(best.ratio - 1, 1e-5)), 10)
        candidates.append(problem.solve(best.B_TM, barrier))
        best = best_columns(candidates)
    return best


def _satisfying_ratio(columns: Columns, exact: bool) -> float:
    """L / floor up to which no further search is worth its time.

    exact: whether the floor can be reached. If so, loss above the floor was accepted for the sake
    of the condition number.
    """
    if exact:
        return 1.002
    return 1.001 if columns.B_TM.numel() > 10 * SMALL else 1.0


def _search(
    problem: SimplexProblem, candidates: list[Columns], generator: torch.Generator
) -> Columns:
    """The best columns after a search for a lower loss than that of the candidates.

    The search first tries other starts, while the loss is poor. Then it solves with lower barriers
    from the best columns.
    """
    entries = candidates[0].B_TM.numel()
    order_T = problem.vectors.G_TT.diag().argsort().argsort()
    if best_columns(candidates).ratio > GOOD:
        candidates.append(problem.solve(problem.tasks(), BARRIER, 1e-3))
    for _ in range(min(6, 20_000 // entries)):
        if best_columns(candidates).ratio > GOOD:
            # Draws follow the order of the norms: a fit does not depend on the order of the tasks.
            draws_TM = torch.empty_like(candidates[0].B_TM)
            draws_TM = draws_TM.exponential_(generator=generator) ** 2
            candidates.append(problem.solve(draws_TM[order_T], BARRIER, 1e-3))
    tolerance = 1e-6 if entries < SMALL else 1e-5
    for lower in (10, 100) if entries < SMALL else (10,):
        best = best_columns(candidates)
        candidates.append(problem.solve(best.B_TM, BARRIER / lower, tolerance))
        exact = problem.moved_inside(candidates[-1].B_TM)
        if exact is not None:
            candidates.append(exact)
        last = candidates[-1]
        if last.condition > MOST_CONDITION:
            candidates.append(problem.solve(last.B_TM, 3 * BARRIER / lower, tolerance))
        if not 1.0001 < best_columns(candidates).ratio <= 1.0005:
            break
    return best_columns(candidates)


def columns_beside_mean(vectors: GramFactor, size: int) -> Tensor:
    """B (T, M) of least loss with u = 1/T as the first column and the others on the simplex.

    Let c_k be the top M − 1 directions beside V u. The span of u and the c_k is the best possible,
    and u + ε c_k ≥ 0 for small ε. So the least loss is always reached: the sum of the energies
    beyond the c_k.
    """
    tasks = len(vectors.G_TT)
    mean_T1 = torch.full((tasks, 1), 1 / tasks, dtype=torch.float64)
    if size == 1:
        return mean_T1
    energy_R, C_TR = vectors.beside_mean
    best_TM, fixed_T1 = C_TR[:, : size - 1], None
    if (vectors.F_RT @ mean_T1).norm() > tasks * EPS * vectors.F_RT.norm():
        best_TM, fixed_T1 = torch.cat([mean_T1, best_TM], 1), mean_T1
    floor = float(energy_R[size - 1 :].clamp(min=0).sum())
    problem = SimplexProblem(vectors, best_TM, floor, size - 1, fixed_T1)
    columns = problem.solve(problem.start(), BARRIER)
    columns = problem.moved_inside(columns.B_TM) or problem.solve(columns.B_TM, BARRIER / 10)
    return torch.cat([mean_T1, columns.B_TM], 1)
