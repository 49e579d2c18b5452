"""Searches for a coefficient, compared with a search of all values, on functions with one maximum
and on arbitrary ones.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import partial

import pytest

from raytvb.maths.line_search import LADDER, best_coefficient, climb, ladder, nearest, tune_vector


def counted(function: Callable[[float], float]) -> tuple[list[float], Callable[[float], float]]:
    seen: list[float] = []

    def value(point: float) -> float:
        seen.append(point)
        return function(point)

    return seen, value


def peaked(top: float, a: float) -> float:
    """A function of a with its maximum, 0, at `top`."""
    return -abs(math.log(a / top))


@pytest.mark.parametrize("rungs", range(1, 10))
def test_climbing_finds_the_maximum_wherever_it_lies(rungs: int) -> None:
    points = [0.1 * 1.5**r for r in range(rungs)]
    for peak in range(rungs):
        for start in range(rungs):
            seen, value = counted(partial(peaked, points[peak]))
            tried = climb(points, start, value)
            assert best_coefficient(tried) == points[peak]
            assert len(seen) == len(set(seen)) and seen[0] == points[start]
            assert sorted(tried) == sorted(seen) and all(
                tried[a] == -abs(math.log(a / points[peak])) for a in tried
            )
            # Up: the rungs to the peak and the next one. Down: also the rung above the start.
            assert len(seen) <= (peak - start + 2 if peak > start else start - peak + 3)


@pytest.mark.parametrize("start", range(6))
def test_climbing_stops_on_a_plateau_at_the_smallest_of_equals(start: int) -> None:
    """Where larger coefficients no longer change the value, a search from above ends at the smaller
    one.
    """
    values = [0.2, 0.5, 0.8, 0.8, 0.8, 0.1]
    points = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    seen, value = counted(lambda a: values[points.index(a)])
    tried = climb(points, start, value)
    assert tried[best_coefficient(tried)] == 0.8 and len(seen) == len(set(seen))
    if start <= 4:
        assert best_coefficient(tried) == 3.0


def test_the_best_coefficient_is_the_smallest_of_equals() -> None:
    assert best_coefficient({0.5: 0.7, 0.25: 0.9, 1.0: 0.9, 0.75: 0.8}) == 0.25
    assert best_coefficient({2.0: 0.0}) == 2.0


@pytest.mark.parametrize("size", [1, 3, 16])
def test_the_ladder_is_multiples_of_one_over_the_size_within_the_limits(size: int) -> None:
    assert ladder(size, 0.0, 100.0) == pytest.approx([m / size for m in LADDER])
    for low, high in [(0.0, 2.0), (0.0, 0.05), (0.1, 0.5), (1.0, 1.5)]:
        points = ladder(size, low, high)
        assert points == sorted(set(points)) and len(points) >= 1
        assert all(low <= a <= high and a > 0.0 for a in points)
        assert {m / size for m in LADDER if low <= m / size <= high} <= set(points)


def unimodal(rng: random.Random, points: Sequence[float], peak: int) -> dict[float, float]:
    """Values that rise up to the peak and fall after it, by steps of any size."""
    steps = [rng.random() + 1e-6 for _ in points]
    return {a: -sum(steps[min(k, peak) : max(k, peak)]) for k, a in enumerate(points)}


def test_climbing_a_ladder_finds_the_only_maximum_of_any_shape() -> None:
    rng = random.Random(1)
    for _ in range(40):
        points = ladder(rng.choice((1, 2, 8, 100)), 0.0, rng.choice((0.03, 0.5, 4.0, 100.0)))
        for peak in range(len(points)):
            values = unimodal(rng, points, peak)
            seen, value = counted(values.__getitem__)
            tried = climb(points, rng.randrange(len(points)), value)
            assert best_coefficient(tried) == points[peak]
            assert tried == {a: values[a] for a in seen} and len(seen) == len(set(seen))


def test_of_any_function_both_neighbours_of_the_best_were_looked_at() -> None:
    """Accuracies are not smooth. The best of the tried coefficients has no better neighbour."""
    rng = random.Random(2)
    for _ in range(500):
        levels = rng.choice((2, 4, 100))
        values = {a: rng.randrange(levels) / levels for a in LADDER}
        seen, value = counted(values.__getitem__)
        tried = climb(LADDER, rng.randrange(len(LADDER)), value)
        assert len(seen) == len(set(seen)) and tried == {a: values[a] for a in seen}
        best = best_coefficient(tried)
        place = LADDER.index(best)
        assert all(
            a in tried and tried[a] <= tried[best] for a in LADDER[max(0, place - 1) : place + 2]
        )


def test_the_nearest_rung() -> None:
    rng = random.Random(3)
    for _ in range(200):
        points, value = (
            sorted(rng.random() for _ in range(rng.randrange(1, 9))),
            rng.uniform(-1.0, 2.0),
        )
        found = points[nearest(points, value)]
        assert all(abs(found - value) <= abs(p - value) for p in points)
    assert nearest([1.0, 2.0, 3.0], 2.5) == 1 and nearest([4.0], 0.0) == 0


def bowl(centre: Sequence[float]) -> Callable[[Sequence[float]], float]:
    return lambda weights: -sum((w - c) ** 2 for w, c in zip(weights, centre, strict=True))


def test_a_tuned_vector_is_the_best_that_was_tried_and_never_worse_than_the_start() -> None:
    start, seen = [0.3, 0.3, 0.3], list[list[float]]()

    def value(weights: Sequence[float]) -> float:
        seen.append(list(weights))
        return bowl([0.5, -0.1, 0.4])(weights)

    weights, best = tune_vector(value, start, trials=25, seed=3)
    assert len(seen) == 25 and seen[0] == start and weights in seen
    assert best == max(map(bowl([0.5, -0.1, 0.4]), seen)) == bowl([0.5, -0.1, 0.4])(weights)
    assert best > bowl([0.5, -0.1, 0.4])(start)
    assert all(-0.3 <= w <= 0.9 for s in seen for w in s)  # from -1 to 3 times the mean size


@pytest.mark.parametrize("start", [[0.25], [0.0, 0.0], [2.0, -1.5, 0.0, 1.0]])
def test_a_start_that_cannot_be_beaten_comes_back(start: list[float]) -> None:
    def value(weights: Sequence[float]) -> float:
        return 1.0 if list(weights) == start else 0.0

    assert tune_vector(value, start, trials=4, seed=0) == (start, 1.0)
    assert tune_vector(value, start, trials=1, seed=0) == (start, 1.0)


def test_a_tuned_vector_is_seeded() -> None:
    found = [tune_vector(bowl([0.9, 0.1]), [0.5, 0.5], trials=8, seed=s) for s in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
