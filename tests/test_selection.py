"""Decisions of a search from its values, compared with brute force, for any order in which the
values arrive.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest

from raytvb.maths.halving import LEAST, Option, choose, halve, pareto_front, survivors

KEEPS = (0.05, 0.25, 1 / 3, 0.5, 0.75, 1.0)
NOT_FINITE = (math.nan, -math.inf, math.inf)


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile of values at a share, with linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def some_value(rng: random.Random, bad: float = 0.1) -> float:
    """A value in 32nds, so that there are ties and quantiles are exact, or a value not finite."""
    return rng.choice(NOT_FINITE) if rng.random() < bad else rng.randrange(33) / 32


def threshold(values: Sequence[float], keep: float) -> float:
    """The least value that goes on: the (1 - keep) quantile, or the second highest where that is
    lower.
    """
    finite = sorted(v for v in values if math.isfinite(v))
    if not finite:
        return math.inf
    return min(quantile(finite, 1 - keep), finite[max(0, len(finite) - LEAST)])


@pytest.mark.parametrize("keep", KEEPS)
def test_those_at_or_above_the_quantile_go_on_and_at_least_two(keep: float) -> None:
    rng = random.Random(0)
    for _ in range(300):
        values = {f"c{k}": some_value(rng) for k in range(rng.randrange(1, 12))}
        finite = {n: v for n, v in values.items() if math.isfinite(v)}
        found = survivors(values, keep)
        assert found <= finite.keys() and len(found) >= min(LEAST, len(finite))
        least, near = (
            threshold(list(values.values()), keep),
            1e-9,
        )  # a quantile on a value may be rounded
        assert {n for n, v in finite.items() if v > least + near} <= found
        assert found <= {n for n, v in finite.items() if v >= least - near}
        assert not {finite[n] for n in finite.keys() - found} & {
            finite[n] for n in found
        }  # equal values are treated alike


@pytest.mark.parametrize(
    ("values", "keep", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4], 0.5, [2, 3]),
        ([0.1, 0.2, 0.3], 0.5, [1, 2]),
        ([0.3, 0.2], 0.5, [0, 1]),
        ([0.2], 0.05, [0]),
        ([0.2, 0.2, 0.2], 0.05, [0, 1, 2]),
        ([0.1, 0.2, 0.3, 0.4], 1.0, [0, 1, 2, 3]),
        ([0.1, 0.9, 0.3, 0.2], 0.25, [1, 2]),
        ([0.1, 0.9, 0.3, 0.3], 0.25, [1, 2, 3]),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], 0.25, [6, 7, 8]),
        ([math.nan, 0.1, -math.inf], 0.5, [1]),
        ([math.nan, 0.1, -math.inf, 0.2, 0.0], 0.05, [1, 3]),
        ([math.nan, math.nan], 1.0, []),
        ([], 0.5, []),
    ],
)
def test_survivors_of_known_values(values: list[float], keep: float, expected: list[int]) -> None:
    assert survivors({str(k): v for k, v in enumerate(values)}, keep) == set(map(str, expected))


@dataclass(frozen=True)
class Field:
    """Candidates with the values they would have, had they gone through all rounds."""

    values: Mapping[str, Sequence[float]]
    groups: Mapping[str, str | None]
    rounds: int
    keep: float

    def together(self) -> dict[str, int]:
        """Number of rounds of each candidate if all candidates end every round together."""
        limits = dict.fromkeys(self.values, 1)
        for done in range(1, self.rounds):
            for group in set(self.groups.values()):
                there = [n for n in self.values if self.groups[n] == group and limits[n] == done]
                least = threshold([self.values[n][done - 1] for n in there], self.keep)
                for name in there:
                    value = self.values[name][done - 1]
                    limits[name] += math.isfinite(value) and (group is None or value >= least)
        return limits

    def end(self, name: str) -> int:
        """Number of rounds that can be measured: a value that is not finite ends a candidate."""
        return next(
            (k for k, v in enumerate(self.values[name], 1) if not math.isfinite(v)), self.rounds
        )


def a_field(rng: random.Random) -> Field:
    count, rounds = rng.randrange(1, 20), rng.randrange(1, 5)
    names = [f"c{k}" for k in range(count)]
    values = {n: [some_value(rng, 0.05) for _ in range(rounds)] for n in names}
    return Field(
        values,
        {n: rng.choice((None, "m1", "m2")) for n in names},
        rounds,
        rng.choice((0.25, 0.5, 0.75, 1.0)),
    )


def known(field: Field, counts: Mapping[str, int]) -> dict[str, Sequence[float]]:
    return {n: field.values[n][: counts[n]] for n in field.values}


def halved(field: Field, counts: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    return halve(known(field, counts), field.groups, field.rounds, field.keep)


def test_with_all_values_it_is_halving_in_rounds_that_all_end_together() -> None:
    rng = random.Random(1)
    for _ in range(500):
        field = a_field(rng)
        limits, missing = halved(field, {n: field.end(n) for n in field.values})
        assert limits == field.together() and not missing


def test_values_beyond_the_limit_decide_nothing() -> None:
    rng = random.Random(2)
    for _ in range(300):
        field = a_field(rng)
        limits = field.together()
        other = replace(
            field,
            values={
                n: [*v[: limits[n]], *(some_value(rng) for _ in v[limits[n] :])]
                for n, v in field.values.items()
            },
        )
        for counts in (limits, {n: field.rounds for n in field.values}):
            assert halved(other, counts) == (limits, {})


def test_whatever_is_known_first_the_limits_are_the_same_in_the_end() -> None:
    """Candidates run at their own pace and are stopped at random. Then the missing rounds are
    measured, a few at a time.
    """
    rng = random.Random(3)
    for _ in range(400):
        field = a_field(rng)
        expected, ends = field.together(), {n: field.end(n) for n in field.values}
        counts = {
            n: rng.randrange(ends[n] + 1) if rng.random() < 0.8 else ends[n] for n in field.values
        }
        steps = 0
        while True:
            limits, missing = halved(field, counts)
            assert (
                all(limits[n] <= expected[n] for n in limits)
                and limits.keys() == field.values.keys()
            )
            if not missing:
                break
            for name, until in missing.items():
                assert (
                    counts[name] < until and counts[name] < ends[name]
                )  # something is left to measure
                if field.groups[name] is None:
                    assert until == field.rounds
                else:
                    assert (
                        until <= expected[name]
                    )  # nothing is measured that halving would not have
            some = rng.sample(sorted(missing), rng.randrange(1, len(missing) + 1))
            for name in some:
                counts[name] = min(ends[name], rng.randrange(counts[name] + 1, missing[name] + 1))
            steps += 1
            assert steps <= field.rounds * len(field.values)
        assert limits == expected
        assert all(counts[n] >= expected[n] for n in counts)


def test_an_asynchronous_scheduler_is_made_up_for() -> None:
    """A candidate ends where it is poor among those that reached the round before it. Then the
    missing rounds are measured.
    """
    rng, stopped_too_early = random.Random(4), 0
    for _ in range(150):
        field = a_field(rng)
        counts = dict.fromkeys(field.values, 0)
        rungs: dict[tuple[str | None, int], dict[str, float]] = {}
        running = list(field.values)
        while running:
            name = rng.choice(running)
            counts[name] += 1
            value, group = field.values[name][counts[name] - 1], field.groups[name]
            seen = rungs.setdefault((group, counts[name]), {})
            seen[name] = value
            poor = group is not None and value < quantile(
                [v for v in seen.values() if math.isfinite(v)] or [0.0], 1 - field.keep
            )
            if counts[name] == field.end(name) or poor:
                running.remove(name)
        expected = field.together()
        stopped_too_early += any(counts[n] < expected[n] for n in counts)
        for _ in range(field.rounds * len(counts)):
            _, missing = halved(field, counts)
            for name, until in missing.items():
                counts[name] = min(until, field.end(name))
        assert halved(field, counts) == (expected, {})
    assert stopped_too_early > 10  # else no round was missing


def test_groups_do_not_touch_each_other_and_the_order_of_names_is_none() -> None:
    rng = random.Random(5)
    for _ in range(200):
        field = a_field(rng)
        counts = {n: rng.randrange(field.end(n) + 1) for n in field.values}
        limits, missing = halved(field, counts)
        names = rng.sample(sorted(counts), len(counts))
        shuffled = replace(
            field,
            values={n: field.values[n] for n in names},
            groups={n: field.groups[n] for n in reversed(names)},
        )
        assert halved(shuffled, counts) == (limits, missing)
        for group in set(field.groups.values()):
            own = {n: g for n, g in field.groups.items() if g == group}
            part = replace(field, values={n: field.values[n] for n in own}, groups=own)
            assert halved(part, counts) == (
                {n: limits[n] for n in own},
                {n: m for n, m in missing.items() if n in own},
            )


def test_nothing_known_asks_for_the_first_round_of_all() -> None:
    limits, missing = halve({"a": [], "b": [], "c": []}, {"a": "m1", "b": "m1", "c": None}, 3, 0.5)
    assert limits == {"a": 1, "b": 1, "c": 1} and missing == {"a": 1, "b": 1, "c": 3}
    assert halve({}, {}, 2, 0.5) == ({}, {})


def some_options(rng: random.Random, shares: int = 1) -> list[Option]:
    options = [
        Option(f"o{k}", tuple(some_value(rng) for _ in range(shares)), rng.randrange(6) * 100)
        for k in range(rng.randrange(9))
    ]
    return rng.sample(options, len(options))


def worse(one: Option, other: Option) -> bool:
    """The other option is not larger and not less accurate, and differs in one of the two."""
    ours, theirs = (one.values[-1], -one.stored_bytes), (other.values[-1], -other.stored_bytes)
    return (
        math.isfinite(theirs[0])
        and theirs != ours
        and all(t >= o for t, o in zip(theirs, ours, strict=True))
    )


def test_the_front_has_those_that_no_other_beats() -> None:
    rng, sizes = random.Random(6), set()
    for _ in range(1000):
        options = some_options(rng, rng.randrange(1, 4))
        expected = [
            o
            for o in options
            if math.isfinite(o.values[-1]) and not any(worse(o, p) for p in options)
        ]
        found = pareto_front(options)
        assert found == [o.name for o in sorted(expected, key=lambda o: (o.stored_bytes, o.name))]
        assert bool(found) == any(math.isfinite(o.values[-1]) for o in options)
        best = choose(options, -1.0)
        assert best is None or best in found
        sizes.add(len(found))
    assert {0, 1, 2, 3} <= sizes


def test_equals_are_both_on_the_front_and_an_option_does_not_beat_itself() -> None:
    one = Option("one", (0.5,), 100)
    assert not one.beats(one) and pareto_front([one, replace(one, name="two")]) == ["one", "two"]
    assert (
        pareto_front([replace(one, name="two"), one]) == ["one", "two"] and pareto_front([]) == []
    )


def test_what_is_not_finite_beats_nothing_and_is_beaten() -> None:
    good = Option("good", (0.0,), 200)
    for value in (math.nan, -math.inf):
        bad = Option("bad", (value,), 100)
        assert not bad.beats(good) and not bad.beats(bad) and pareto_front([bad, good]) == ["good"]
        assert good.beats(replace(bad, stored_bytes=200)) and not good.beats(bad)  # larger


def test_a_stopped_option_is_compared_on_the_images_that_it_has_seen() -> None:
    stopped, whole = Option("stopped", (0.5,), 100), Option("whole", (0.6, 0.4), 100)
    assert (
        whole.beats(stopped)
        and not stopped.beats(whole)
        and pareto_front([stopped, whole]) == ["whole"]
    )
    assert not Option("whole", (0.4, 0.6), 100).beats(stopped)


def brute_choice(options: Sequence[Option], least: float, tolerance: float | None) -> str | None:
    valid = [o for o in options if math.isfinite(o.values[-1]) and o.values[-1] > least]
    if not valid:
        return None
    best = max(o.values[-1] for o in valid)
    if tolerance is None:
        equals = [o for o in valid if o.values[-1] == best]
        smallest = min(o.stored_bytes for o in equals)
        return min(o.name for o in equals if o.stored_bytes == smallest)
    near = [o for o in valid if o.values[-1] >= best - tolerance]
    smallest = min(o.stored_bytes for o in near)
    near = [o for o in near if o.stored_bytes == smallest]
    top = max(o.values[-1] for o in near)
    return min(o.name for o in near if o.values[-1] == top)


def test_the_choice_is_the_most_accurate_or_the_smallest_that_is_near() -> None:
    rng, found = random.Random(7), set()
    for _ in range(1500):
        options, least = some_options(rng, 2), rng.choice((-1.0, 0.25, 0.5, 0.9))
        for tolerance in (None, 0.0, 1 / 32, 0.25, 0.99):
            chosen = choose(options, least, tolerance)
            assert chosen == brute_choice(options, least, tolerance)
            found.add((chosen is None, tolerance))
    assert len(found) == 10


def test_a_choice_on_known_values() -> None:
    options = [
        Option("large", (0.1, 0.70), 800),
        Option("middle", (0.2, 0.69), 400),
        Option("small", (0.9, 0.68), 200),
        Option("broken", (0.5, math.nan), 1),
        Option("infinite", (0.5, -math.inf), 1),
    ]
    assert [choose(options, 0.0, t) for t in (None, 0.0, 0.01, 0.02, 0.9)] == [
        "large",
        "large",
        "middle",
        "small",
        "small",
    ]
    assert choose(options, 0.685, 0.02) == "middle" and choose(options, 0.69, 0.02) == "large"
    assert (
        choose(options, 0.70) is None
        and choose(options, 0.70, 0.5) is None
        and choose([], 0.0) is None
    )
    assert choose(options[3:], -1.0) is None
    twins = [Option("b", (0.5,), 100), Option("a", (0.5,), 100), Option("0", (0.5,), 101)]
    assert choose(twins, 0.0) == choose(twins[::-1], 0.0) == choose(twins, 0.0, 0.1) == "a"


@pytest.mark.parametrize("points", range(1, 100))
def test_a_tolerance_of_one_point_is_one_point_whatever_the_rounding(points: int) -> None:
    best, near, far = points / 100, (points - 1) / 100, (points - 1) / 100 - 1e-6
    assert choose([Option("best", (best,), 2), Option("near", (near,), 1)], -1.0, 0.01) == "near"
    assert choose([Option("best", (best,), 2), Option("far", (far,), 1)], -1.0, 0.01) == "best"
