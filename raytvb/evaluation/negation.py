"""Measures how well one task can be forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from raytvb.evaluation.evaluation import Context, Evaluation
from raytvb.evaluation.rows import Row, write_rows
from raytvb.evaluation.store_names import negation_name
from raytvb.experiment.present_versions import Parents, PresentVersions
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.maths.counts import Count
from raytvb.models.evaluator import Evaluator
from raytvb.search.additions import Additions
from raytvb.search.candidates import Candidate
from raytvb.storage.contract import JsonObject

NEGATION_LADDER = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0, 4.0, 5.0)


@dataclass(frozen=True)
class Negation(Evaluation):
    """Forget one task: subtract its vector with the largest coefficient that spares the control.

    The control task must keep the share `keep` of its accuracy. Its accuracy falls as the
    coefficient grows, so bisection on validation images finds the largest such coefficient of
    NEGATION_LADDER. If this coefficient does not lower the accuracy of the task to forget on those
    images, nothing is subtracted. The test split is read only for the chosen coefficient. The
    `model` of the rows is `before` or `after`; the control also has rows of the split `val`.
    """

    candidate: Candidate
    task: str
    """The task to forget."""
    control: TaskConfig
    keep: float
    """Share of its zero-shot accuracy that the control must keep, 0 to 1."""

    splits: ClassVar[tuple[str, ...]] = ("val", "test")

    @property
    def name(self) -> str:
        """`negation-`, the candidate and the task."""
        return negation_name(self.candidate.name, self.task)

    @property
    def choices(self) -> JsonObject:
        """The control, and the share that it must keep."""
        return {"control": self.control.model_dump(mode="json"), "keep": self.keep}

    def parents(self, present: PresentVersions) -> Parents:
        """The task's own vector, or the basis that it is decoded from."""
        if self.candidate.uses_stored_basis:
            return present.of_basis(self.candidate.basis)
        return present.of_vectors([self.task])

    def run(self, context: Context) -> None:
        """Measure, and write the rows."""
        control = self.control.name
        validation, test = context.evaluator("val"), context.evaluator("test")
        index = context.experiment.task_names.index(self.task)
        additions = Additions(context.experiment, self.candidate, validation, context.present)
        direction = next(additions.directions([(index,)]))
        control_before = validation.zero_shot(control)
        coefficient, control_after = self._strongest(validation, direction, control_before)
        rows = [
            Row.of("before", "val", 0, 0, control, 0.0, control_before),
            Row.of("after", "val", 0, 0, control, coefficient, control_after),
        ]
        for task in (self.task, control):
            rows.append(Row.of("before", "test", 0, 0, task, 0.0, test.zero_shot(task)))
        test.merge(direction, -coefficient)
        for task in (self.task, control):
            rows.append(Row.of("after", "test", 0, 0, task, coefficient, test.count(task)))
        write_rows(context.store, self.name, rows, self.identity, self.parents(context.present))

    def _strongest(
        self, validation: Evaluator, direction: Tensor | None, control_before: Count
    ) -> tuple[float, Count]:
        """The coefficient to subtract with, and the control's correct answers after that."""
        target_before = validation.zero_shot(self.task)
        floor = self.keep * control_before.accuracy
        chosen, control_after = 0.0, control_before
        low, high = -1, len(NEGATION_LADDER)
        while high - low > 1:
            middle = (low + high) // 2
            validation.merge(direction, -NEGATION_LADDER[middle])
            control = validation.count(self.control.name)
            if control.accuracy >= floor:
                low, chosen, control_after = middle, NEGATION_LADDER[middle], control
            else:
                high = middle
        validation.merge(direction, -chosen)
        if validation.count(self.task).accuracy >= target_before.accuracy:
            return 0.0, control_before
        return chosen, control_after
