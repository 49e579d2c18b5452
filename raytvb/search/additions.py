"""The additions of one candidate: directions streamed from stored files, and their counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from raytvb.experiment.config import Experiment
from raytvb.maths.counts import Count
from raytvb.models.evaluator import Evaluator
from raytvb.search.candidates import Candidate
from raytvb.storage.vector_set import COMBINED_BYTES

Counts = list[dict[str, Count]]  # of each subset, by task


class InvalidCandidateError(ValueError):
    """A candidate that cannot be measured, whatever is tried: its text says why."""


class Additions:
    """The additions of one candidate: their directions come from stored files, streamed, a few at a
    time.
    """

    def __init__(self, experiment: Experiment, candidate: Candidate, evaluator: Evaluator) -> None:
        self.names, self.candidate = experiment.task_names, candidate
        self._evaluator, self._seed = evaluator, experiment.seed
        self._vectors, self._table = candidate.open(experiment)
        self._ratios = (
            candidate.ratios(experiment)
            if candidate.has_lengths
            else torch.ones(self._table.shape[1])
        )
        self._own = self._table * self._ratios
        self._held: tuple[Any, list[Tensor | None]] = ((), [])

    def directions(
        self, subsets: Sequence[Sequence[int]], own: bool = False
    ) -> Iterator[Tensor | None]:
        """What each subset adds up to; `own`: of vectors that have the lengths of the task vectors.

        Those of the last subsets are kept, where all of them are 512 MB or less.
        """
        key = (own, *map(tuple, subsets))
        if self._held[0] == key:
            yield from self._held[1]
            return
        made: list[Tensor | None] = []
        held, total = True, 0
        for direction in self.candidate.directions(
            self._vectors, self._own if own else self._table, subsets, self._seed
        ):
            if direction is not None and not bool(torch.isfinite(direction).all()):
                raise InvalidCandidateError(
                    f"{self.candidate.name}: its vectors add up to NaN or infinite values"
                )
            total += 0 if direction is None else direction.nbytes
            held = held and total <= COMBINED_BYTES
            # A view of a larger tensor would keep that.
            made = [*made, direction if direction is None else direction.clone()] if held else []
            yield direction
        self._held = (key, made) if held else ((), [])

    def counts(
        self,
        subsets: Sequence[Sequence[int]],
        alpha: float,
        own: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> Iterator[dict[str, Count]]:
        """Correct answers by task for the addition of each subset's tasks, on the images of those
        tasks.
        """
        for subset, direction in zip(subsets, self.directions(subsets, own), strict=True):
            self._evaluator.merge(direction, alpha)
            yield {self.names[t]: self._evaluator.count(self.names[t], start, stop) for t in subset}

    def weighted(self, weights: Tensor, *, per_basis: bool) -> Counts:
        """Counts for the addition of all tasks with a weight (T,) for each, or (F,) for each stored
        vector.
        """
        combined = weights.double() if per_basis else self._table @ weights.double()
        self._evaluator.merge(next(self._vectors.combinations(combined[:, None])), 1.0)
        return [{name: self._evaluator.count(name) for name in self.names}]

    def start_weights(self, alpha: float, *, own: bool, per_basis: bool) -> Tensor:
        """The weights that say the same as one coefficient for the addition of all tasks."""
        tasks = torch.full((self._table.shape[1],), alpha, dtype=torch.float64)
        tasks = tasks * self._ratios if own else tasks
        return self._table @ tasks if per_basis else tasks
