"""Forgetting one task."""

from __future__ import annotations

from raytvb.evaluation.additions import Identity
from raytvb.evaluation.rows import row, write_rows
from raytvb.experiment.config import Experiment
from raytvb.models.evaluator import Evaluator
from raytvb.search.additions import Additions
from raytvb.search.candidates import Candidate
from raytvb.storage.store import Store

NEGATION_LADDER = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0, 4.0, 5.0)


def evaluate_negation(
    experiment: Experiment,
    name: str,
    identity: Identity,
    candidate: Candidate,
    index: int,
    control: str,
    validation: Evaluator,
    test: Evaluator,
) -> None:
    """Forget one task: subtract its vector as far as the control keeps its share of accuracy on
    validation.

    The largest such coefficient of the ladder is found by bisection (the control falls as the
    coefficient grows); if it does not lower the target on validation, nothing is subtracted. The
    test split is read for that one alone.
    """
    task = experiment.task_names[index]
    direction = next(Additions(experiment, candidate, validation).directions([(index,)]))
    unchanged = {name: validation.zero_shot(name) for name in (task, control)}
    floor = experiment.evaluate.keep * unchanged[control].accuracy
    chosen, kept = 0.0, unchanged[control]
    low, high = -1, len(NEGATION_LADDER)
    while high - low > 1:
        middle = (low + high) // 2
        validation.merge(direction, -NEGATION_LADDER[middle])
        held = validation.count(control)
        if held.accuracy >= floor:
            low, chosen, kept = middle, NEGATION_LADDER[middle], held
        else:
            high = middle
    validation.merge(direction, -chosen)
    if validation.count(task).accuracy >= unchanged[task].accuracy:
        chosen, kept = 0.0, unchanged[control]
    found = [
        row("before", "val", 0, 0, control, 0.0, unchanged[control]),
        row("after", "val", 0, 0, control, chosen, kept),
    ]
    found += [row("before", "test", 0, 0, n, 0.0, test.zero_shot(n)) for n in (task, control)]
    test.merge(direction, -chosen)
    found += [row("after", "test", 0, 0, n, chosen, test.count(n)) for n in (task, control)]
    write_rows(Store(experiment.store), name, found, identity)
