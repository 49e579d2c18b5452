"""The body of a search trial: the coefficients of one candidate, chosen on growing shares of the validation images.

A round is a share. On the first, the coefficient of every size class is searched; on the later ones the best is
measured on the images that come to it. The rounds of a candidate depend on nothing but the candidate, so a trial that
is repeated, or whose first rounds are known, gives the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raytvb.candidates import Candidate
from raytvb.coefficients import best_coefficient, climb, ladder, nearest, tune_vector
from raytvb.config import Experiment
from raytvb.evaluate import Count, Evaluator, even_grid, mean, task_subsets
from raytvb.vectors import COMBINED_BYTES

Counts = list[dict[str, Count]]  # of each subset, by task


class InvalidCandidateError(ValueError):
    """A candidate that cannot be measured, whatever is tried: its text says why."""


class Additions:
    """The additions of one candidate: their directions come from stored files, streamed, a few at a time."""

    def __init__(self, experiment: Experiment, candidate: Candidate, evaluator: Evaluator) -> None:
        self.names, self.candidate = experiment.task_names, candidate
        self._evaluator, self._seed = evaluator, experiment.seed
        self._vectors, self._table = candidate.open(experiment)
        self._ratios = candidate.ratios(experiment) if candidate.has_lengths else torch.ones(self._table.shape[1])
        self._own = self._table * self._ratios
        self._held: tuple[Any, list[Tensor | None]] = ((), [])

    def directions(self, subsets: Sequence[Sequence[int]], own: bool = False) -> Iterator[Tensor | None]:
        """What each subset adds up to; `own`: of vectors that have the lengths of the task vectors.

        Those of the last subsets are kept, where all of them are 512 MB or less.
        """
        key = (own, *map(tuple, subsets))
        if self._held[0] == key:
            yield from self._held[1]
            return
        made: list[Tensor | None] = []
        held, total = True, 0
        for direction in self.candidate.directions(self._vectors, self._own if own else self._table,
                                                    subsets, self._seed):
            if direction is not None and not bool(torch.isfinite(direction).all()):
                raise InvalidCandidateError(f"{self.candidate.name}: its vectors add up to NaN or infinite values")
            total += 0 if direction is None else direction.nbytes
            held = held and total <= COMBINED_BYTES
            # A view of a larger tensor would keep that.
            made = [*made, direction if direction is None else direction.clone()] if held else []
            yield direction
        self._held = (key, made) if held else ((), [])

    def counts(self, subsets: Sequence[Sequence[int]], alpha: float, own: bool = False, start: float = 0.0,
               stop: float = 1.0) -> Iterator[dict[str, Count]]:
        """Correct answers by task for the addition of each subset's tasks, on the images of those tasks."""
        for subset, direction in zip(subsets, self.directions(subsets, own), strict=True):
            self._evaluator.merge(direction, alpha)
            yield {self.names[t]: self._evaluator.count(self.names[t], start, stop) for t in subset}

    def weighted(self, weights: Tensor, *, per_basis: bool) -> Counts:
        """Counts for the addition of all tasks with a weight (T,) for each, or (F,) for each stored vector."""
        combined = weights.double() if per_basis else self._table @ weights.double()
        self._evaluator.merge(next(self._vectors.combinations(combined[:, None])), 1.0)
        return [{name: self._evaluator.count(name) for name in self.names}]

    def start_weights(self, alpha: float, *, own: bool, per_basis: bool) -> Tensor:
        """The weights that say the same as one coefficient for the addition of all tasks."""
        tasks = torch.full((self._table.shape[1],), alpha, dtype=torch.float64)
        tasks = tasks * self._ratios if own else tasks
        return self._table @ tasks if per_basis else tasks


Setting = tuple[float, bool]  # a coefficient, and whether decoded vectors have the task vectors' own lengths


class SizeClass:
    """Accuracy of additions of one number of tasks by setting, on shares of the images; nothing is measured twice.

    `shares` rise; images are measured between one and the next, so that what has been measured when does not matter.
    """

    def __init__(self, additions: Additions, subsets: Sequence[Sequence[int]], shares: Sequence[float]) -> None:
        self._additions, self._subsets, self._shares = additions, subsets, shares
        self._counts: dict[Setting, list[Counts]] = {}

    def value(self, setting: Setting, number: int) -> float:
        """Mean accuracy over all tasks of all subsets on the first `number` shares."""
        return mean([c.accuracy for counts in self._totals(setting, number) for c in counts.values()])

    def expected(self, setting: Setting, number: int) -> float:
        """As `value`, of the expected share of correct answers."""
        return mean([c.expected / c.total for counts in self._totals(setting, number) for c in counts.values()])

    def _totals(self, setting: Setting, number: int) -> Counts:
        """Counts by subset and task on the first `number` shares."""
        parts, (alpha, own) = self._counts.setdefault(setting, []), setting
        while len(parts) < number:
            start = self._shares[len(parts) - 1] if parts else 0.0
            stop = self._shares[len(parts)]
            parts.append(list(self._additions.counts(self._subsets, alpha, own, start, stop)))
        return [{t: sum((p[k][t] for p in parts[:number]), Count(0, 0)) for t in parts[0][k]}
                for k in range(len(self._subsets))]

    def row(self, size: int, setting: Setting, number: int) -> dict[str, Any]:
        """What the first `number` shares say of a setting."""
        total = sum((c for counts in self._totals(setting, number) for c in counts.values()), Count(0, 0))
        return {"size": size, "coefficient": setting[0], "own_lengths": setting[1],
                "accuracy": self.value(setting, number), "expected": self.expected(setting, number),
                "correct": total.correct, "total": total.total}


def lengths_to_try(experiment: Experiment, candidate: Candidate, size: int) -> tuple[bool, ...]:
    """Whether additions of `size` tasks are tried with projected lengths (False), the task vectors' own, or both."""
    asked = experiment.search.lengths
    if not candidate.has_lengths or asked == "projected":
        return (False,)
    return (True,) if asked == "own" else (False, True) if size < len(experiment.tasks) else (False,)


def first_round(experiment: Experiment, size_class: SizeClass, addends: int,
                lengths: Sequence[bool] = (False,)) -> list[Setting]:
    """The settings that are measured on the first share: those of a line search, or all of the grid.

    The line search climbs by the expected number of correct answers (see `Count`), which is less noisy than accuracy on
    a part of the images. With the second kind of lengths it starts where it ended with the first.
    """
    limits, found = experiment.search.coefficients, list[Setting]()
    if limits.strategy == "grid":
        return [(a, own) for own in lengths for a in even_grid(limits.low, limits.high, limits.points)]
    rungs = ladder(addends, limits.low, limits.high)
    likely = (1.0 if addends == 1 else 2.0) / addends
    for own in lengths:
        tried = climb(rungs, nearest(rungs, likely), partial(_expected, size_class, own))
        found += [(a, own) for a in tried]
        likely = best_coefficient(tried)
    return found


def _expected(size_class: SizeClass, own: bool, alpha: float) -> float:
    return size_class.expected((alpha, own), 1)


def promising(tried: Sequence[Mapping[str, Any]], strategy: str) -> list[Setting]:
    """Settings that are worth more images, out of what was tried for a size class: the one with the most expected
    answers, and the most accurate where it is more accurate by over a standard error. All of a grid."""
    if strategy == "grid":
        return [(t["coefficient"], t["own_lengths"]) for t in tried]
    likely = min(tried, key=lambda t: (-t["expected"], t["coefficient"], t["own_lengths"]))
    accurate = most_accurate(tried)
    error = math.sqrt(likely["accuracy"] * (1 - likely["accuracy"]) / likely["total"])
    both = [likely, *([accurate] if accurate["accuracy"] > likely["accuracy"] + error else [])]
    return sorted((t["coefficient"], t["own_lengths"]) for t in both)


def most_accurate(tried: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row with the highest accuracy; of equals that of the smallest coefficient, and of projected lengths."""
    return min(tried, key=lambda t: (-t["accuracy"], t["coefficient"], t["own_lengths"]))


class CandidateSearch:
    """The rounds of one candidate; what a round has measured is kept for the next."""

    def __init__(self, experiment: Experiment, candidate: Candidate, evaluator: Evaluator,
                 sizes: Collection[int] | None = None) -> None:
        """sizes: the size classes that are looked at; default: all."""
        self._experiment, self._candidate = experiment, candidate
        self._additions = Additions(experiment, candidate, evaluator)
        subsets = candidate.subsets(task_subsets(len(experiment.tasks), experiment.seed))
        self._classes = {size: SizeClass(self._additions, found, experiment.search.shares)
                         for size, found in subsets.items() if sizes is None or size in sizes}

    def round(self, number: int, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """Round `number` (from 1); `before` is the result of the round before it.

        Returns by size the coefficient, whether decoded vectors get their own lengths, and the accuracy; the objective,
        all that was tried, and how many images that took (in this round; those measured in the one before are not
        counted again). In the last round also the vector of coefficients that Optuna found, where one is asked for.
        """
        experiment, shares = self._experiment, self._experiment.search.shares
        strategy, chosen = experiment.search.coefficients.strategy, dict[str, Mapping[str, Any]]()
        tried, images = list[dict[str, Any]](), 0
        for size, size_class in self._classes.items():
            known = [] if before is None else [t for t in before["tried"] if t["size"] == size]
            rows = [size_class.row(size, s, number) for s in self._settings(size, size_class, known)]
            good = promising(rows, strategy)
            chosen[str(size)] = most_accurate([r for r in rows if (r["coefficient"], r["own_lengths"]) in good])
            earlier = {(t["coefficient"], t["own_lengths"]): t["total"] for t in known}
            images += sum(r["total"] - earlier.get((r["coefficient"], r["own_lengths"]), 0) for r in rows)
            tried += rows
        accuracy = {s: r["accuracy"] for s, r in chosen.items()}
        result: dict[str, Any] = {
            "objective": objective(experiment, accuracy), "share": shares[number - 1],
            "coefficient": {s: r["coefficient"] for s, r in chosen.items()},
            "own_lengths": {s: r["own_lengths"] for s, r in chosen.items()}, "accuracy": accuracy, "tried": tried,
            "images": images, "evaluations": len(tried)}
        asked, full = experiment.search.coefficients, str(len(experiment.tasks))
        tunable = self._candidate.kind in ("full", "decoded") and self._candidate.merge == "sum"
        if number == len(shares) and asked.vector != "none" and tunable and full in chosen:
            result["vector"] = self._tuned(chosen[full], asked.vector == "per-basis")
            result["images"] += result["vector"]["images"]
        return result

    def _settings(self, size: int, size_class: SizeClass, known: Sequence[Mapping[str, Any]]) -> list[Setting]:
        if self._candidate.kind == "zero-shot":
            return [(0.0, False)]
        if known:
            return promising(known, self._experiment.search.coefficients.strategy)
        lengths = lengths_to_try(self._experiment, self._candidate, size)
        return sorted(first_round(self._experiment, size_class, self._candidate.addends(size), lengths))

    def _tuned(self, chosen: Mapping[str, Any], per_basis: bool) -> dict[str, Any]:
        """Weights of the addition of all tasks, one for each task or stored vector, from those of one coefficient."""
        asked, images = self._experiment.search.coefficients, 0

        def value(weights: Sequence[float]) -> float:
            nonlocal images
            counts, = self._additions.weighted(torch.tensor(weights, dtype=torch.float64), per_basis=per_basis)
            images += sum(c.total for c in counts.values())
            return mean([c.accuracy for c in counts.values()])

        start = self._additions.start_weights(chosen["coefficient"], own=chosen["own_lengths"], per_basis=per_basis)
        weights, accuracy = tune_vector(value, start.tolist(), trials=asked.trials, seed=self._experiment.seed)
        return {"kind": asked.vector, "weights": weights, "accuracy": accuracy, "trials": asked.trials,
                "images": images}


def objective(experiment: Experiment, accuracy: Mapping[str, float]) -> float:
    """What is maximised, from the accuracy of each size class that the candidate has."""
    full = str(len(experiment.tasks))
    asked = experiment.search.objective
    if asked == "subsets":
        return mean(list(accuracy.values()))
    return accuracy["1"] if asked == "single" and "1" in accuracy else accuracy[full]
