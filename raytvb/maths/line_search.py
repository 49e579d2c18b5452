"""The search for merge coefficients.

The accuracy of a merge, as a function of its coefficient, rises to a maximum and falls, or nearly
so. The best coefficient of an addition is near one over the number of vectors added. So the search
runs on a ladder of multiples of that number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

LADDER = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
"""Rungs, as multiples of one over the number of vectors added."""

Value = Callable[[float], float]


def ladder(size: int, low: float, high: float) -> list[float]:
    """Coefficients to choose from for additions of `size` vectors, rising.

    They are the multiples of 1/size in LADDER; those outside the range become its ends. 0, which
    adds nothing, is not among them.
    """
    return sorted({min(max(m / size, low), high) for m in LADDER} - {0.0})


def nearest(rungs: Sequence[float], value: float) -> int:
    """Position of the rung that is nearest to a value."""
    return min(range(len(rungs)), key=lambda k: abs(rungs[k] - value))


def climb(rungs: Sequence[float], start: int, value: Value) -> dict[float, float]:
    """Line search for the maximum of a unimodal function on a ladder, from rung `start`.

    The search goes up while the next rung is better. If the first step up is not better, it goes
    down while the next rung is better or equal. So it evaluates a few rungs instead of all. Returns
    every coefficient that it tried, with its value.
    """
    tried = {rungs[start]: value(rungs[start])}
    for step in (1, -1):
        rung = start + step
        while 0 <= rung < len(rungs):
            tried[rungs[rung]] = value(rungs[rung])
            before = tried[rungs[rung - step]]
            if tried[rungs[rung]] < before or (step == 1 and tried[rungs[rung]] == before):
                break
            rung += step
        if rung - step != start:  # the search went up, so the other side is lower
            break
    return tried


def tune_vector(
    value: Callable[[Sequence[float]], float], start: Sequence[float], *, trials: int, seed: int
) -> tuple[list[float], float]:
    """The best of `trials` weight vectors, and its value.

    Optuna's tree-structured Parzen estimator suggests the vectors. `start` is the first of them, so
    the result is never worse than `start`. Each weight lies between -1 and 3 times the mean size of
    the weights of `start`; the range is widened to include its own start.
    """
    import optuna  # slow to import, and only a few searches need it

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    reach = sum(abs(s) for s in start) / len(start) or 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, n_startup_trials=max(1, min(10, trials // 4))
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    bounds = [(min(-reach, s), max(3 * reach, s)) for s in start]
    study.enqueue_trial({f"w{k}": s for k, s in enumerate(start)})

    def value_of(trial: optuna.Trial) -> float:
        return value([trial.suggest_float(f"w{k}", *b) for k, b in enumerate(bounds)])

    study.optimize(value_of, n_trials=trials)
    return [study.best_params[f"w{k}"] for k in range(len(start))], float(study.best_value)


def best_coefficient(tried: Mapping[float, float]) -> float:
    """The coefficient with the highest value; among equal values, the smallest coefficient."""
    return min(tried, key=lambda a: (-tried[a], a))
