"""Measures the accuracy of additions: those of the seeded subsets that the search used, and those
that the experiment lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from raytvb.evaluation.evaluation import Context, Evaluation, chosen_settings
from raytvb.evaluation.rows import Row, write_rows
from raytvb.evaluation.store_names import additions_name
from raytvb.experiment.config import Experiment
from raytvb.experiment.present_versions import Parents, PresentVersions
from raytvb.experiment.sections.search import CoefficientConfig
from raytvb.maths.subsets import task_subsets
from raytvb.search.additions import Additions
from raytvb.search.candidates import Candidate
from raytvb.search.identities import search_parents
from raytvb.search.results import MeasuredOutcome, Setting, TunedWeights
from raytvb.search.size_class import SizeClass, first_round, lengths_to_try, most_accurate
from raytvb.storage.contract import JsonObject


@dataclass(frozen=True)
class SubsetAdditions(Evaluation):
    """Test accuracy of a candidate, with the settings that the search chose.

    The `model` of the rows is the candidate's name. If there are tuned weights, the addition of all
    tasks with these has rows of the model `per-task` or `per-basis`.
    """

    candidate: Candidate
    outcome: MeasuredOutcome

    @property
    def name(self) -> str:
        """The candidate's name."""
        return self.candidate.name

    @property
    def choices(self) -> JsonObject:
        """The settings by number of tasks, and the tuned weights."""
        vector = None if self.outcome.vector is None else self.outcome.vector.to_json()
        return {**chosen_settings(self.outcome), "vector": vector}

    def parents(self, present: PresentVersions) -> Parents:
        """The vectors of all tasks, and the basis if there is one."""
        return search_parents(present, self.candidate)

    def run(self, context: Context) -> None:
        """Measure, and write the rows."""
        additions = Additions(
            context.experiment, self.candidate, context.evaluator("test"), context.present
        )
        rows = self._subset_rows(context.experiment, additions)
        if self.outcome.vector is not None:
            rows += _weighted_rows(additions, self.outcome.vector)
        write_rows(context.store, self.name, rows, self.identity, self.parents(context.present))

    def _subset_rows(self, experiment: Experiment, additions: Additions) -> list[Row]:
        rows: list[Row] = []
        every_size = task_subsets(len(experiment.tasks), experiment.seed)
        for size, subsets in self.candidate.subsets(every_size).items():
            setting = self.outcome.setting(size)
            counted = additions.counts(subsets, setting.coefficient, setting.own_lengths)
            for number, counts in enumerate(counted):
                for task, count in counts.items():
                    rows.append(
                        Row.of(self.name, "test", size, number, task, setting.coefficient, count)
                    )
        return rows


def _weighted_rows(additions: Additions, vector: TunedWeights) -> list[Row]:
    """Rows of the addition of all tasks with tuned weights."""
    weights = torch.tensor(vector.weights)
    counts = additions.weighted(weights, per_basis=vector.per_basis)
    rows: list[Row] = []
    for task, count in counts.items():
        rows.append(Row.of(vector.kind, "test", len(counts), 0, task, None, count))
    return rows


@dataclass(frozen=True)
class NamedAdditions(Evaluation):
    """Test accuracy of the additions that the experiment lists.

    The setting of each addition is chosen on validation images. The `model` of the rows is the
    candidate's name, and `subset` is the position of the addition in the list.
    """

    candidate: Candidate
    groups: tuple[tuple[str, ...], ...]
    """Names of the tasks of each addition."""
    coefficients: CoefficientConfig
    lengths: str

    splits: ClassVar[tuple[str, ...]] = ("val", "test")

    @property
    def name(self) -> str:
        """`additions/` and the candidate's name."""
        return additions_name(self.candidate.name)

    @property
    def choices(self) -> JsonObject:
        """The additions, and how their settings are searched."""
        return {
            "additions": [list(group) for group in self.groups],
            "coefficients": self.coefficients.model_dump(mode="json"),
            "lengths": self.lengths,
        }

    def parents(self, present: PresentVersions) -> Parents:
        """The vectors of all tasks, and the basis if there is one."""
        return search_parents(present, self.candidate)

    def run(self, context: Context) -> None:
        """Measure, and write the rows."""
        experiment = context.experiment
        on_validation = Additions(
            experiment, self.candidate, context.evaluator("val"), context.present
        )
        on_test = Additions(experiment, self.candidate, context.evaluator("test"), context.present)
        rows: list[Row] = []
        for number, group in enumerate(self.groups):
            subset = tuple(experiment.task_names.index(task) for task in group)
            best = self._best_setting(experiment, on_validation, subset)
            (counts,) = on_test.counts([subset], best.coefficient, best.own_lengths)
            for task, count in counts.items():
                rows.append(
                    Row.of(
                        self.candidate.name,
                        "test",
                        len(subset),
                        number,
                        task,
                        best.coefficient,
                        count,
                    )
                )
        write_rows(context.store, self.name, rows, self.identity, self.parents(context.present))

    def _best_setting(
        self, experiment: Experiment, additions: Additions, subset: tuple[int, ...]
    ) -> Setting:
        """The most accurate setting on all validation images."""
        size_class = SizeClass(additions, [subset], (1.0,))
        settings = first_round(
            experiment,
            size_class,
            self.candidate.addends(len(subset)),
            lengths_to_try(experiment, self.candidate, len(subset)),
        )
        return most_accurate([size_class.row(setting, 1) for setting in settings]).setting
