"""What a search decides from its figures: which candidates go on, which one is chosen, which are on
the Pareto front.

Pure functions of numbers, so that a decision does not depend on the order in which trials end, or
on a restart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEAST = 2  # candidates of a group that go on, where there are as many: with fewer there is nothing to compare


def survivors(values: Mapping[str, float], keep: float) -> set[str]:
    """Those that go on: values at or above the (1 - keep) quantile, as in ASHA with reduction
    factor 1 / keep.

    Li et al., MLSys 2020, arXiv 1810.05934. At least two go on. Values that are not finite never
    do.
    """
    finite = {n: v for n, v in values.items() if math.isfinite(v)}
    if len(finite) <= LEAST:
        return set(finite)
    least = min(
        float(np.percentile(list(finite.values()), 100 * (1 - keep))),
        sorted(finite.values())[-LEAST],
    )
    return {n for n, v in finite.items() if v >= least}


def halve(
    values: Mapping[str, Sequence[float]],
    groups: Mapping[str, str | None],
    rounds: int,
    keep: float,
) -> tuple[dict[str, int], dict[str, int]]:
    """Successive halving within groups: (rounds each candidate goes through, rounds of those that
    lack values).

    values: of each candidate after its first rounds, as many as there are. Candidates of the group
    None go through all. It is what ASHA would do if all candidates of a group ended a round
    together; a candidate whose values show that it goes on, but which has no value for the next
    round, is among the second.
    """
    limits, missing = dict[str, int](), dict[str, int]()
    for group in dict.fromkeys(groups.values()):
        alive = {n for n, g in groups.items() if g == group}
        for done in range(1, rounds + 1):
            limits |= dict.fromkeys(alive, done)
            lacking = {n for n in alive if len(values[n]) < done}
            if lacking:
                missing |= dict.fromkeys(lacking, rounds if group is None else done)
                break
            if group is not None:
                alive = survivors({n: values[n][done - 1] for n in alive}, keep)
            else:
                alive = {n for n in alive if math.isfinite(values[n][done - 1])}
    return limits, missing


@dataclass(frozen=True)
class Option:
    """A candidate as it is chosen from: its accuracy (0 to 1) on each share of the validation
    images, and its bytes.
    """

    name: str
    values: tuple[float, ...]
    stored_bytes: int

    def beats(self, other: Option) -> bool:
        """At least as accurate on the images that both have seen and not larger, and better in one
        of the two.
        """
        last = min(len(self.values), len(other.values)) - 1
        ours, theirs = self.values[last], other.values[last]
        if not math.isfinite(ours):
            return False
        return (
            not theirs > ours
            and self.stored_bytes <= other.stored_bytes
            and (
                ours > theirs or self.stored_bytes < other.stored_bytes or not math.isfinite(theirs)
            )
        )


def pareto_front(options: Sequence[Option]) -> list[str]:
    """Names of those that no other beats, the smallest first: accuracy against stored bytes."""
    front = [
        o for o in options if math.isfinite(o.values[-1]) and not any(p.beats(o) for p in options)
    ]
    return [o.name for o in sorted(front, key=lambda o: (o.stored_bytes, o.name))]


def choose(options: Sequence[Option], least: float, tolerance: float | None = None) -> str | None:
    """The most accurate option; with a tolerance the smallest whose accuracy is at most that much
    below it.

    options: those that went through all rounds. least: the accuracy without any of them; an option
    that is not above it is not valid. None where no option is valid. Of equals the smaller, then
    the first by name.
    """
    valid = [o for o in options if math.isfinite(o.values[-1]) and o.values[-1] > least]
    if not valid:
        return None
    best = max(o.values[-1] for o in valid)
    if tolerance is None:
        return min(valid, key=lambda o: (-o.values[-1], o.stored_bytes, o.name)).name
    near = [
        o for o in valid if o.values[-1] >= best - tolerance - 1e-12
    ]  # one point below 0.7 is 0.69, not 0.6899…
    return min(near, key=lambda o: (o.stored_bytes, -o.values[-1], o.name)).name
