"""Weight disentanglement of pairs of tasks."""

from __future__ import annotations

import pyarrow as pa
from torch import Tensor

from raytvb.evaluation.additions import Identity
from raytvb.evaluation.rows import write_rows
from raytvb.experiment.config import Experiment
from raytvb.maths.counts import even_grid
from raytvb.models.evaluator import Evaluator
from raytvb.search.additions import Additions
from raytvb.search.candidates import Candidate
from raytvb.storage.store import Store

PAIR_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("split", pa.string()),
        ("first", pa.string()),
        ("second", pa.string()),
        ("alpha", pa.float64()),
        ("beta", pa.float64()),
        ("disagree", pa.int64()),
        ("total", pa.int64()),
        ("error", pa.float64()),
    ]
)


def evaluate_disentanglement(
    experiment: Experiment,
    name: str,
    identity: Identity,
    candidate: Candidate,
    pair: tuple[str, str],
    test: Evaluator,
) -> None:
    """Weight disentanglement error of two tasks over a grid of their coefficients.

    error(a, b) = sum over both tasks of the share of its images that theta_0 + a tau_1 + b tau_2
    answers otherwise than the model with that task's part alone (0 to 2; Ortiz-Jimenez et al.,
    NeurIPS 2023, arXiv 2305.12827, eq. 4).
    """
    asked = experiment.evaluate.disentanglement
    assert asked is not None
    points = even_grid(asked.low, asked.high, asked.points)
    index = [experiment.task_names.index(n) for n in pair]
    first, second = Additions(experiment, candidate, test).directions([(i,) for i in index])
    assert first is not None and second is not None
    alone: list[list[Tensor]] = []
    for task, direction in zip(pair, (first, second), strict=True):
        alone.append([])
        for alpha in points:
            test.merge(direction, alpha)
            alone[-1].append(test.answers(task)[0])
    found = []
    for a, alpha in enumerate(points):
        for b, beta in enumerate(points):
            test.merge(alpha * first + beta * second, 1.0)
            wrong = [
                int((test.answers(task)[0] != own).sum())
                for task, own in zip(pair, (alone[0][a], alone[1][b]), strict=True)
            ]
            totals = [len(alone[0][a]), len(alone[1][b])]
            found.append(
                {
                    "model": candidate.name,
                    "split": "test",
                    "first": pair[0],
                    "second": pair[1],
                    "alpha": alpha,
                    "beta": beta,
                    "disagree": sum(wrong),
                    "total": sum(totals),
                    "error": sum(w / t for w, t in zip(wrong, totals, strict=True)),
                }
            )
    write_rows(Store(experiment.store), name, found, identity, PAIR_SCHEMA)
