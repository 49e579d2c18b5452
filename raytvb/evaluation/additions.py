"""What is measured on the test split once all is chosen: single models, additions, negations, tasks
arriving over time, unseen tasks and the disentanglement of pairs. Bodies of Ray tasks; each writes
its rows (see `rows`) as the last thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from raytvb.evaluation.rows import row, write_rows
from raytvb.experiment.config import Experiment
from raytvb.experiment.stored import vector_set
from raytvb.maths.subsets import task_subsets
from raytvb.models.evaluator import Evaluator
from raytvb.search.additions import Additions
from raytvb.search.candidates import Candidate
from raytvb.search.size_class import SizeClass, first_round, lengths_to_try, most_accurate
from raytvb.storage.store import Store

Identity = Mapping[str, Any]


def evaluate_candidate(
    experiment: Experiment,
    name: str,
    identity: Identity,
    candidate: Candidate,
    coefficients: Mapping[str, float],
    own_lengths: Mapping[str, bool],
    weights: Mapping[str, Any] | None,
    test: Evaluator,
) -> None:
    """Test accuracy of a candidate with what was chosen on validation data for each size;
    `weights`: a vector.
    """
    additions, found = Additions(experiment, candidate, test), []
    for size, subsets in candidate.subsets(
        task_subsets(len(experiment.tasks), experiment.seed)
    ).items():
        alpha = coefficients[str(size)]
        for number, counts in enumerate(additions.counts(subsets, alpha, own_lengths[str(size)])):
            found += [
                row(candidate.name, "test", size, number, t, alpha, c) for t, c in counts.items()
            ]
    if weights is not None:
        kind = weights["kind"]
        (counts,) = additions.weighted(
            torch.tensor(weights["weights"]), per_basis=kind == "per-basis"
        )
        found += [row(kind, "test", len(counts), 0, t, None, c) for t, c in counts.items()]
    write_rows(Store(experiment.store), name, found, identity)


def evaluate_models(experiment: Experiment, name: str, identity: Identity, test: Evaluator) -> None:
    """Test accuracy of the pretrained model on every task, and of each fine-tuned model on its
    own.
    """
    found = [
        row("zero-shot", "test", 0, 0, task, 0.0, test.zero_shot(task))
        for task in experiment.task_names
    ]
    vectors = vector_set(experiment.store, experiment.task_names)
    each = vectors.combinations(torch.eye(len(experiment.tasks), dtype=torch.float64))
    for index, (task, direction) in enumerate(zip(experiment.task_names, each, strict=True)):
        test.merge(direction, 1.0)
        found.append(row("fine-tuned", "test", 1, index, task, 1.0, test.count(task)))
    write_rows(Store(experiment.store), name, found, identity)


def evaluate_additions(
    experiment: Experiment,
    name: str,
    identity: Identity,
    candidate: Candidate,
    validation: Evaluator,
    test: Evaluator,
) -> None:
    """Test accuracy of the additions of `evaluate.additions`, each with a coefficient of its own
    from validation.
    """
    names, found = experiment.task_names, []
    on_val, on_test = (Additions(experiment, candidate, e) for e in (validation, test))
    for number, group in enumerate(experiment.evaluate.additions):
        subset = tuple(names.index(n) for n in group)
        size_class = SizeClass(on_val, [subset], (1.0,))
        settings = first_round(
            experiment,
            size_class,
            candidate.addends(len(subset)),
            lengths_to_try(experiment, candidate, len(subset)),
        )
        best = most_accurate([size_class.row(len(subset), s, 1) for s in settings])
        alpha = best["coefficient"]
        (counts,) = on_test.counts([subset], alpha, best["own_lengths"])
        found += [
            row(candidate.name, "test", len(subset), number, t, alpha, c) for t, c in counts.items()
        ]
    write_rows(Store(experiment.store), name, found, identity)
