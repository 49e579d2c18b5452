"""What a search decides from accuracies: which candidates go on, which one is chosen, and which are
on the Pareto front.

These are pure functions of numbers, so that a decision depends neither on the order in which trials
end nor on a restart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEAST = 2
"""At least this many candidates of a group go on, since fewer cannot be compared."""


def survivors(values: Mapping[str, float], keep: float) -> set[str]:
    """Names of the candidates that go on: their values are at or above the (1 - keep) quantile.

    This is the rule of ASHA with reduction factor 1 / keep (Li et al., MLSys 2020, arXiv
    1810.05934). At least two candidates go on, but none whose value is not finite.
    """
    finite = {n: v for n, v in values.items() if math.isfinite(v)}
    if len(finite) <= LEAST:
        return set(finite)
    rising = sorted(finite.values())
    quantile = float(np.percentile(rising, 100 * (1 - keep)))
    least = min(quantile, rising[-LEAST])
    return {n for n, v in finite.items() if v >= least}


def halve(
    values: Mapping[str, Sequence[float]],
    groups: Mapping[str, str | None],
    rounds: int,
    keep: float,
) -> tuple[dict[str, int], dict[str, int]]:
    """Successive halving within groups, as ASHA would do it if all candidates of a group ended a
    round together.

    Args:
        values: by the candidate's name, its value after each round that it has ended so far.
        groups: the group of each candidate. Only the best of a group go on to the next round.
            All candidates of the group None go on if their value is finite.
        rounds: the number of rounds.
        keep: the fraction of a group that goes on, see `survivors`.

    Returns two dicts by name. The first has the number of rounds that each candidate goes through,
    as far as the values tell. The second has only the candidates that lack the value of their next
    round, with the number of the round up to which they must run.
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
            latest = {n: values[n][done - 1] for n in alive}
            alive = survivors(latest, keep) if group is not None else _finite(latest)
    return limits, missing


def _finite(values: Mapping[str, float]) -> set[str]:
    """Names whose value is finite."""
    return {n for n, v in values.items() if math.isfinite(v)}


@dataclass(frozen=True)
class Option:
    """A candidate that can be chosen."""

    name: str
    values: tuple[float, ...]
    """Its accuracy (0 to 1) on each share of the validation images that it was measured on."""
    stored_bytes: int

    def beats(self, other: Option) -> bool:
        """Whether this option is not larger than `other`, at least as accurate, and better in one
        of the two. Accuracies are compared on the largest share of images that both have seen.
        """
        last = min(len(self.values), len(other.values)) - 1
        ours, theirs = self.values[last], other.values[last]
        if not math.isfinite(ours) or theirs > ours or self.stored_bytes > other.stored_bytes:
            return False
        more_accurate = ours > theirs or not math.isfinite(theirs)
        return more_accurate or self.stored_bytes < other.stored_bytes


def pareto_front(options: Sequence[Option]) -> list[str]:
    """Names of the options that no other beats, the smallest first."""
    names = list[str]()
    for option in sorted(options, key=lambda o: (o.stored_bytes, o.name)):
        beaten = any(other.beats(option) for other in options)
        if math.isfinite(option.values[-1]) and not beaten:
            names.append(option.name)
    return names


def choose(options: Sequence[Option], least: float, tolerance: float | None = None) -> str | None:
    """Name of the most accurate option. Ties go to the smaller option, then to the first by name.

    Args:
        options: the options that went through all rounds.
        least: the accuracy (0 to 1) without any option. Only an option above it is valid.
        tolerance: if given, the result is the smallest valid option whose accuracy is at most this
            much (0 to 1) below the highest.

    Returns None if no option is valid.
    """
    valid = [o for o in options if math.isfinite(o.values[-1]) and o.values[-1] > least]
    if not valid:
        return None
    best = max(o.values[-1] for o in valid)
    if tolerance is None:
        return min(valid, key=lambda o: (-o.values[-1], o.stored_bytes, o.name)).name
    lowest = best - tolerance - 1e-12  # one point below 0.7 is 0.69, not 0.6899…
    near = [o for o in valid if o.values[-1] >= lowest]
    return min(near, key=lambda o: (o.stored_bytes, -o.values[-1], o.name)).name
