"""The body of a search trial: chooses the coefficients of one candidate on growing shares of the
validation images.

There is one round for each share. The first round searches the coefficient of every size class.
Later rounds measure the promising settings on the images that their share adds. The rounds of a
candidate do not depend on other candidates, so a trial that is repeated, or that continues from
known rounds, gives the same results.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from raytvb.experiment.config import Experiment
from raytvb.experiment.present_versions import PresentVersions
from raytvb.maths.counts import mean
from raytvb.maths.line_search import tune_vector
from raytvb.maths.subsets import task_subsets
from raytvb.models.evaluator import Evaluator
from raytvb.search.additions import Additions
from raytvb.search.candidates import Candidate
from raytvb.search.results import Measured, Setting, Tried, TunedWeights
from raytvb.search.size_class import (
    NOTHING_ADDED,
    SizeClass,
    first_round,
    lengths_to_try,
    most_accurate,
    promising,
)


class CandidateSearch:
    """Measures the rounds of one candidate. Keeps the measurements of a round for the next."""

    def __init__(
        self,
        experiment: Experiment,
        candidate: Candidate,
        evaluator: Evaluator,
        present: PresentVersions,
        sizes: Collection[int] | None = None,
    ) -> None:
        """evaluator: of the validation split. sizes: the size classes to search; default: all."""
        self._experiment = experiment
        self._candidate = candidate
        self._additions = Additions(experiment, candidate, evaluator, present)
        self._classes: dict[int, SizeClass] = {}
        subsets = candidate.subsets(task_subsets(len(experiment.tasks), experiment.seed))
        for size, subsets_of_size in subsets.items():
            if sizes is None or size in sizes:
                self._classes[size] = SizeClass(
                    self._additions, subsets_of_size, experiment.search.shares
                )

    def round(self, number: int, before: Measured | None) -> Measured:
        """Round `number` (from 1), given the round before it.

        Raises InvalidCandidateError if its vectors add up to values that are not finite.
        """
        tried: list[Tried] = []
        best: dict[int, Tried] = {}
        for size, size_class in self._classes.items():
            settings = self._settings(size_class, before)
            rows = [size_class.row(setting, number) for setting in settings]
            best[size] = self._best(rows)
            tried += rows
        accuracy = {size: row.accuracy for size, row in best.items()}
        vector = self._tuned(number, best)
        images = self._images(number, tried, before)
        if vector is not None:
            images += vector.images
        return Measured(
            objective=objective(self._experiment, accuracy),
            share=self._experiment.search.shares[number - 1],
            coefficient={size: row.coefficient for size, row in best.items()},
            own_lengths={size: row.own_lengths for size, row in best.items()},
            accuracy=accuracy,
            tried=tuple(tried),
            images=images,
            evaluations=len(tried),
            vector=vector,
        )

    def _settings(self, size_class: SizeClass, before: Measured | None) -> list[Setting]:
        """The settings that a round measures, in rising order."""
        if self._candidate.kind == "zero-shot":
            return [NOTHING_ADDED]
        if before is not None:
            strategy = self._experiment.search.coefficients.strategy
            return promising(before.tried_of(size_class.size), strategy)
        lengths = lengths_to_try(self._experiment, self._candidate, size_class.size)
        addends = self._candidate.addends(size_class.size)
        return sorted(first_round(self._experiment, size_class, addends, lengths))

    def _best(self, rows: Sequence[Tried]) -> Tried:
        """The most accurate of the promising rows."""
        good = promising(rows, self._experiment.search.coefficients.strategy)
        return most_accurate([row for row in rows if row.setting in good])

    def _images(self, number: int, tried: Sequence[Tried], before: Measured | None) -> int:
        """The forward passes for the rows of a round, in images (see `Measured.images`)."""
        if self._candidate.kind == "zero-shot":
            by_task: dict[str, int] = {}
            for size_class in self._classes.values():
                by_task |= size_class.new_images(NOTHING_ADDED, number)
            return sum(by_task.values())
        earlier: dict[tuple[int, Setting], int] = {}
        if before is not None:
            earlier = {(row.size, row.setting): row.total for row in before.tried}
        images = 0
        for row in tried:
            images += row.total - earlier.get((row.size, row.setting), 0)
        return images

    def _tuned(self, number: int, best: Mapping[int, Tried]) -> TunedWeights | None:
        """The weights of the addition of all tasks that Optuna finds in the last round.

        None in other rounds, if the experiment does not ask for weights, or if the candidate has
        none.
        """
        coefficients = self._experiment.search.coefficients
        all_tasks = len(self._experiment.tasks)
        is_last = number == len(self._experiment.search.shares)
        if not is_last or not self._candidate.has_weights or all_tasks not in best:
            return None
        if coefficients.vector == "none":
            return None
        value = _WeightsValue(self._additions, per_basis=coefficients.vector == "per-basis")
        start = self._additions.start_weights(best[all_tasks].setting, per_basis=value.per_basis)
        weights, accuracy = tune_vector(
            value, start.tolist(), trials=coefficients.trials, seed=self._experiment.seed
        )
        return TunedWeights(
            kind=coefficients.vector,
            weights=tuple(weights),
            accuracy=accuracy,
            trials=coefficients.trials,
            images=value.images,
        )


class _WeightsValue:
    """Mean accuracy of the addition of all tasks, as a function of its weights."""

    def __init__(self, additions: Additions, *, per_basis: bool) -> None:
        self._additions = additions
        self.per_basis = per_basis
        self.images = 0
        """Forward passes of all calls, in images."""

    def __call__(self, weights: Sequence[float]) -> float:
        tensor = torch.tensor(weights, dtype=torch.float64)
        counts = self._additions.weighted(tensor, per_basis=self.per_basis)
        self.images += sum(count.total for count in counts.values())
        return mean([count.accuracy for count in counts.values()])


def objective(experiment: Experiment, accuracy: Mapping[int, float]) -> float:
    """What the search maximises, from the accuracy by number of tasks added.

    A candidate that can only add all tasks has a single size class. The accuracy of that class is
    then its objective, whatever the experiment asks for.
    """
    match experiment.search.objective:
        case "subsets":
            return mean(list(accuracy.values()))
        case "single" if 1 in accuracy:
            return accuracy[1]
        case _:
            return accuracy[len(experiment.tasks)]
