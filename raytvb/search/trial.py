"""The body of a search trial: the coefficients of one candidate, chosen on growing shares of the
validation images.

A round is a share. On the first, the coefficient of every size class is searched; on the later ones
the best is measured on the images that come to it. The rounds of a candidate depend on nothing but
the candidate, so a trial that is repeated, or whose first rounds are known, gives the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from raytvb.experiment.config import Experiment
from raytvb.maths.counts import mean
from raytvb.maths.line_search import tune_vector
from raytvb.maths.subsets import task_subsets
from raytvb.models.evaluator import Evaluator
from raytvb.search.additions import Additions
from raytvb.search.candidates import Candidate
from raytvb.search.size_class import (
    Setting,
    SizeClass,
    first_round,
    lengths_to_try,
    most_accurate,
    promising,
)


class CandidateSearch:
    """The rounds of one candidate; what a round has measured is kept for the next."""

    def __init__(
        self,
        experiment: Experiment,
        candidate: Candidate,
        evaluator: Evaluator,
        sizes: Collection[int] | None = None,
    ) -> None:
        """sizes: the size classes that are looked at; default: all."""
        self._experiment, self._candidate = experiment, candidate
        self._additions = Additions(experiment, candidate, evaluator)
        subsets = candidate.subsets(task_subsets(len(experiment.tasks), experiment.seed))
        self._classes = {
            size: SizeClass(self._additions, found, experiment.search.shares)
            for size, found in subsets.items()
            if sizes is None or size in sizes
        }

    def round(self, number: int, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """Round `number` (from 1); `before` is the result of the round before it.

        Returns by size the coefficient, whether decoded vectors get their own lengths, and the
        accuracy; the objective, all that was tried, and how many images that took (in this round;
        those measured in the one before are not counted again). In the last round also the vector
        of coefficients that Optuna found, where one is asked for.
        """
        experiment, shares = self._experiment, self._experiment.search.shares
        strategy, chosen = experiment.search.coefficients.strategy, dict[str, Mapping[str, Any]]()
        tried, images = list[dict[str, Any]](), 0
        for size, size_class in self._classes.items():
            known = [] if before is None else [t for t in before["tried"] if t["size"] == size]
            rows = [
                size_class.row(size, s, number) for s in self._settings(size, size_class, known)
            ]
            good = promising(rows, strategy)
            chosen[str(size)] = most_accurate(
                [r for r in rows if (r["coefficient"], r["own_lengths"]) in good]
            )
            earlier = {(t["coefficient"], t["own_lengths"]): t["total"] for t in known}
            images += sum(
                r["total"] - earlier.get((r["coefficient"], r["own_lengths"]), 0) for r in rows
            )
            tried += rows
        accuracy = {s: r["accuracy"] for s, r in chosen.items()}
        result: dict[str, Any] = {
            "objective": objective(experiment, accuracy),
            "share": shares[number - 1],
            "coefficient": {s: r["coefficient"] for s, r in chosen.items()},
            "own_lengths": {s: r["own_lengths"] for s, r in chosen.items()},
            "accuracy": accuracy,
            "tried": tried,
            "images": images,
            "evaluations": len(tried),
        }
        asked, full = experiment.search.coefficients, str(len(experiment.tasks))
        tunable = self._candidate.kind in ("full", "decoded") and self._candidate.merge == "sum"
        if number == len(shares) and asked.vector != "none" and tunable and full in chosen:
            result["vector"] = self._tuned(chosen[full], asked.vector == "per-basis")
            result["images"] += result["vector"]["images"]
        return result

    def _settings(
        self, size: int, size_class: SizeClass, known: Sequence[Mapping[str, Any]]
    ) -> list[Setting]:
        if self._candidate.kind == "zero-shot":
            return [(0.0, False)]
        if known:
            return promising(known, self._experiment.search.coefficients.strategy)
        lengths = lengths_to_try(self._experiment, self._candidate, size)
        return sorted(
            first_round(self._experiment, size_class, self._candidate.addends(size), lengths)
        )

    def _tuned(self, chosen: Mapping[str, Any], per_basis: bool) -> dict[str, Any]:
        """Weights of the addition of all tasks, one for each task or stored vector, from those of
        one coefficient.
        """
        asked, images = self._experiment.search.coefficients, 0

        def value(weights: Sequence[float]) -> float:
            nonlocal images
            (counts,) = self._additions.weighted(
                torch.tensor(weights, dtype=torch.float64), per_basis=per_basis
            )
            images += sum(c.total for c in counts.values())
            return mean([c.accuracy for c in counts.values()])

        start = self._additions.start_weights(
            chosen["coefficient"], own=chosen["own_lengths"], per_basis=per_basis
        )
        weights, accuracy = tune_vector(
            value, start.tolist(), trials=asked.trials, seed=self._experiment.seed
        )
        return {
            "kind": asked.vector,
            "weights": weights,
            "accuracy": accuracy,
            "trials": asked.trials,
            "images": images,
        }


def objective(experiment: Experiment, accuracy: Mapping[str, float]) -> float:
    """What is maximised, from the accuracy of each size class that the candidate has."""
    full = str(len(experiment.tasks))
    asked = experiment.search.objective
    if asked == "subsets":
        return mean(list(accuracy.values()))
    return accuracy["1"] if asked == "single" and "1" in accuracy else accuracy[full]
