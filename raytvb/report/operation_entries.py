"""Builds the results of operations on task vectors: named additions, negation, unseen tasks, and
the disentanglement of pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raytvb.evaluation.rows import Row, read_pair_rows, read_rows
from raytvb.evaluation.store_names import additions_name, negation_name, pair_name, unseen_name
from raytvb.experiment.config import Experiment
from raytvb.maths.counts import even_grid, mean, wilson
from raytvb.report.accuracies import measured
from raytvb.report.summary_contracts import (
    Disentanglement,
    NamedAddition,
    NamedAdditionModel,
    Negation,
    PairErrors,
    UnseenEntry,
    UnseenModel,
)
from raytvb.storage.store import Store


def named_additions(
    store: Store, experiment: Experiment, subjects: Sequence[str], fine_tuned: Mapping[str, float]
) -> list[NamedAddition]:
    """The additions that the experiment lists, for each subject (`full` and the chosen basis).

    fine_tuned: accuracy of each task's own model.
    """
    groups = experiment.evaluate.additions
    if not groups:
        return []
    rows = {subject: read_rows(store, additions_name(subject)) for subject in subjects}
    additions = []
    for number, group in enumerate(groups):
        models = {}
        for subject in subjects:
            own_rows = [row for row in rows[subject] if row.subset == number]
            models[subject] = _named_addition_model(own_rows, fine_tuned)
        additions.append(NamedAddition(tasks=tuple(group), models=models))
    return additions


def _named_addition_model(
    rows: Sequence[Row], fine_tuned: Mapping[str, float]
) -> NamedAdditionModel:
    accuracies = measured(rows, fine_tuned)
    return NamedAdditionModel(**dict(accuracies), coefficient=_coefficient(rows[0]))


def negations(store: Store, experiment: Experiment, subject: str | None) -> dict[str, Negation]:
    """Negation of every task, from one subject. Empty if there is no control or no subject."""
    if experiment.control is None or subject is None:
        return {}
    entries = {}
    for task in experiment.task_names:
        rows = read_rows(store, negation_name(subject, task))
        entries[task] = _negation(rows, task, experiment.control.name)
    return entries


def _negation(rows: Sequence[Row], task: str, control: str) -> Negation:
    by_place = {(row.split, row.model, row.task): row for row in rows}
    after = by_place["test", "after", task]
    return Negation(
        before=by_place["test", "before", task].accuracy,
        after=after.accuracy,
        interval=wilson(after.count),
        control_before=by_place["test", "before", control].accuracy,
        control_after=by_place["test", "after", control].accuracy,
        coefficient=_coefficient(after),
        control_validation_before=by_place["val", "before", control].accuracy,
        control_validation_after=by_place["val", "after", control].accuracy,
    )


def _coefficient(row: Row) -> float:
    assert row.coefficient is not None  # only additions with several coefficients have none
    return row.coefficient


def unseen_entries(store: Store, experiment: Experiment) -> dict[str, UnseenEntry]:
    """The results on the unseen tasks of the experiment, by name."""
    entries = {}
    for task in experiment.unseen:
        rows = {row.model: row for row in read_rows(store, unseen_name(task.name))}
        entries[task.name] = UnseenEntry(
            images=rows["full"].subset,
            zero_shot=_unseen_model(rows["zero-shot"]),
            basis=_unseen_model(rows["basis"]),
            full=_unseen_model(rows["full"]),
        )
    return entries


def _unseen_model(row: Row) -> UnseenModel:
    return UnseenModel(accuracy=row.accuracy, interval=wilson(row.count), coefficients=row.size)


def disentanglements(
    store: Store, experiment: Experiment, subjects: Sequence[str]
) -> list[Disentanglement]:
    """The errors of the experiment's pairs of tasks, for every subject."""
    grid = experiment.evaluate.disentanglement
    if grid is None:
        return []
    points = even_grid(grid.low, grid.high, grid.points)
    entries = []
    for pair in experiment.pairs:
        models = {}
        for subject in subjects:
            rows = read_pair_rows(store, pair_name(subject, pair))
            errors = [row.error for row in rows]
            models[subject] = _pair_errors(errors, len(points))
        entries.append(Disentanglement(tasks=pair, coefficients=tuple(points), models=models))
    return entries


def _pair_errors(errors: Sequence[float], columns: int) -> PairErrors:
    """The errors of a grid as a matrix. The second coefficient varies fastest in `errors`."""
    matrix = []
    for start in range(0, len(errors), columns):
        matrix.append(tuple(errors[start : start + columns]))
    return PairErrors(error=tuple(matrix), mean=mean(errors))
