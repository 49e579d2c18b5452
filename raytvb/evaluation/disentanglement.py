"""Measures the weight disentanglement of pairs of tasks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from raytvb.evaluation.evaluation import Context, Evaluation
from raytvb.evaluation.rows import PairRow, write_pair_rows
from raytvb.evaluation.store_names import pair_name
from raytvb.experiment.present_versions import Parents, PresentVersions
from raytvb.experiment.sections.evaluate import DisentanglementConfig
from raytvb.maths.counts import even_grid
from raytvb.models.evaluator import Evaluator
from raytvb.search.additions import Additions
from raytvb.search.candidates import Candidate
from raytvb.storage.contract import JsonObject


@dataclass(frozen=True)
class Disentanglement(Evaluation):
    """Weight disentanglement error of two tasks over a grid of their coefficients.

    error(a, b), from 0 to 2, is a sum over both tasks. The term of a task is the share of its
    images on which theta_0 + a tau_1 + b tau_2 gives another answer than the model with only that
    task's part added (Ortiz-Jimenez et al., NeurIPS 2023, arXiv 2305.12827, eq. 4).
    """

    candidate: Candidate
    pair: tuple[str, str]
    grid: DisentanglementConfig

    @property
    def name(self) -> str:
        """`disentanglement/`, the candidate and the pair."""
        return pair_name(self.candidate.name, self.pair)

    @property
    def choices(self) -> JsonObject:
        """The grid."""
        return {"grid": self.grid.model_dump(mode="json", exclude={"pairs"})}

    def parents(self, present: PresentVersions) -> Parents:
        """The vectors of the pair, or the basis that they are decoded from."""
        if self.candidate.uses_stored_basis:
            return present.of_basis(self.candidate.basis)
        return present.of_vectors(self.pair)

    def run(self, context: Context) -> None:
        """Measure, and write one row for each point of the grid."""
        test = context.evaluator("test")
        tasks = context.experiment.task_names
        additions = Additions(context.experiment, self.candidate, test, context.present)
        subsets = [(tasks.index(task),) for task in self.pair]
        first, second = additions.directions(subsets)
        if first is None or second is None:
            raise ValueError(f"{self.candidate.name} adds nothing: it cannot be disentangled")
        points = even_grid(self.grid.low, self.grid.high, self.grid.points)
        first_alone = _answers_alone(test, self.pair[0], first, points)
        second_alone = _answers_alone(test, self.pair[1], second, points)
        rows: list[PairRow] = []
        for alpha, first_answers in zip(points, first_alone, strict=True):
            for beta, second_answers in zip(points, second_alone, strict=True):
                test.merge(alpha * first + beta * second, 1.0)
                rows.append(self._row(test, alpha, beta, first_answers, second_answers))
        write_pair_rows(
            context.store, self.name, rows, self.identity, self.parents(context.present)
        )

    def _row(
        self, test: Evaluator, alpha: float, beta: float, first_alone: Tensor, second_alone: Tensor
    ) -> PairRow:
        """Compare the current model with the answers (n,) that each task's part alone gives."""
        disagree, total, error = 0, 0, 0.0
        for task, alone in zip(self.pair, (first_alone, second_alone), strict=True):
            differing = int((test.answers(task)[0] != alone).sum())
            disagree += differing
            total += len(alone)
            error += differing / len(alone)
        return PairRow(
            model=self.candidate.name,
            split="test",
            first=self.pair[0],
            second=self.pair[1],
            alpha=alpha,
            beta=beta,
            disagree=disagree,
            total=total,
            error=error,
        )


def _answers_alone(
    test: Evaluator, task: str, direction: Tensor, coefficients: list[float]
) -> list[Tensor]:
    """The answers (n,) on the task's images with only its direction added, for each coefficient."""
    answers: list[Tensor] = []
    for coefficient in coefficients:
        test.merge(direction, coefficient)
        answers.append(test.answers(task)[0])
    return answers
