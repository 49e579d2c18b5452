"""The additions of one candidate: their directions, made from stored files, and the correct answers
of the merged models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytvb.experiment.config import Experiment
from raytvb.experiment.present_versions import PresentVersions
from raytvb.maths.counts import Count
from raytvb.models.evaluator import Evaluator
from raytvb.search.candidates import Candidate
from raytvb.search.merged_vectors import NotFiniteError
from raytvb.search.results import Setting
from raytvb.storage.vector_set import COMBINED_BYTES

Counts = list[dict[str, Count]]
"""Correct answers of each subset, by task."""


class InvalidCandidateError(ValueError):
    """A candidate that no repeated attempt can measure. The message gives the reason."""


@dataclass(frozen=True)
class _HeldDirections:
    """Directions of the last subsets, kept for the next coefficient."""

    subsets: tuple[tuple[int, ...], ...]
    own_lengths: bool
    directions: tuple[Tensor | None, ...]


class Additions:
    """The additions of one candidate, measured with one evaluator."""

    def __init__(
        self,
        experiment: Experiment,
        candidate: Candidate,
        evaluator: Evaluator,
        present: PresentVersions,
    ) -> None:
        self.names = experiment.task_names
        self.candidate = candidate
        self._evaluator = evaluator
        self._seed = experiment.seed
        self._vectors, self._table = candidate.open(experiment, present)
        self._ratios = torch.ones(self._table.shape[1])
        if candidate.has_lengths:
            self._ratios = candidate.ratios(experiment, present)
        self._held: _HeldDirections | None = None
        self._pretrained: dict[tuple[str, float, float], Count] = {}

    def directions(
        self, subsets: Sequence[Sequence[int]], own_lengths: bool = False
    ) -> Iterator[Tensor | None]:
        """The sum (or merge) of each subset's task vectors, float32, one at a time; None if the
        candidate adds nothing.

        own_lengths: first give decoded vectors the lengths of the task vectors. The directions of
        the last subsets are kept in memory if they take at most 512 MB together.
        Raises InvalidCandidateError for a direction that is not finite.
        """
        wanted = tuple(map(tuple, subsets))
        held = self._held
        if held is not None and (held.subsets, held.own_lengths) == (wanted, own_lengths):
            yield from held.directions
            return
        kept: list[Tensor | None] = []
        kept_bytes = 0
        table = self._table * self._ratios if own_lengths else self._table
        for direction in self._made(table, subsets):
            if direction is None:
                kept.append(None)
            else:
                self._check_finite(direction)
                kept_bytes += direction.nbytes
                if kept_bytes <= COMBINED_BYTES:
                    # A copy: the direction may be a view, which would keep a larger tensor alive.
                    kept.append(direction.clone())
                else:
                    kept.clear()
            yield direction
        fits = kept_bytes <= COMBINED_BYTES
        self._held = _HeldDirections(wanted, own_lengths, tuple(kept)) if fits else None

    def _made(self, table: Tensor, subsets: Sequence[Sequence[int]]) -> Iterator[Tensor | None]:
        """As `Candidate.directions`."""
        try:
            yield from self.candidate.directions(self._vectors, table, subsets, self._seed)
        except NotFiniteError as error:
            raise self._not_finite() from error

    def _check_finite(self, direction: Tensor) -> None:
        if not bool(torch.isfinite(direction).all()):
            raise self._not_finite()

    def _not_finite(self) -> InvalidCandidateError:
        return InvalidCandidateError(
            f"{self.candidate.name}: its vectors add up to NaN or infinite values"
        )

    def counts(
        self,
        subsets: Sequence[Sequence[int]],
        coefficient: float,
        own_lengths: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> Iterator[dict[str, Count]]:
        """The correct answers of each addition, by task.

        The model of a subset is measured on the images of the subset's own tasks, from share
        `start` to share `stop` of each task's images.
        """
        directions = self.directions(subsets, own_lengths)
        for subset, direction in zip(subsets, directions, strict=True):
            tasks = [self.names[t] for t in subset]
            if direction is None:
                yield {task: self._pretrained_count(task, start, stop) for task in tasks}
            else:
                self._evaluator.merge(direction, coefficient)
                yield {task: self._evaluator.count(task, start, stop) for task in tasks}

    def _pretrained_count(self, task: str, start: float, stop: float) -> Count:
        """Correct answers of the pretrained model, measured once for all subsets with this task."""
        key = (task, start, stop)
        if key not in self._pretrained:
            self._evaluator.merge(None)
            self._pretrained[key] = self._evaluator.count(task, start, stop)
        return self._pretrained[key]

    def weighted(self, weights: Tensor, *, per_basis: bool) -> dict[str, Count]:
        """Correct answers by task for the weighted addition of all tasks.

        weights: (T,) one for each task; with `per_basis` (F,) one for each stored vector.
        """
        combined = weights.double() if per_basis else self._table @ weights.double()
        self._evaluator.merge(next(self._vectors.combinations(combined[:, None])), 1.0)
        return {name: self._evaluator.count(name) for name in self.names}

    def start_weights(self, setting: Setting, *, per_basis: bool) -> Tensor:
        """The weights, float64, that give the same addition of all tasks as one coefficient."""
        tasks = torch.full((self._table.shape[1],), setting.coefficient, dtype=torch.float64)
        if setting.own_lengths:
            tasks = tasks * self._ratios
        return self._table @ tasks if per_basis else tasks
