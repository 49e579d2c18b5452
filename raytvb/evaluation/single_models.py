"""Measures the accuracy of single models: the pretrained model, and each fine-tuned model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from raytvb.evaluation.evaluation import Context, Evaluation
from raytvb.evaluation.rows import Row, write_rows
from raytvb.evaluation.store_names import SINGLE_MODELS
from raytvb.experiment.stored import vector_set


@dataclass(frozen=True)
class SingleModels(Evaluation):
    """Test accuracy of the pretrained model on every task, and of fine-tuned models on their tasks.

    The `model` of the rows is `zero-shot` or `fine-tuned`.
    """

    @property
    def name(self) -> str:
        """`models`."""
        return SINGLE_MODELS

    def run(self, context: Context) -> None:
        """Measure, and write the rows."""
        test, tasks = context.evaluator("test"), context.experiment.task_names
        rows: list[Row] = []
        for task in tasks:
            rows.append(Row.of("zero-shot", "test", 0, 0, task, 0.0, test.zero_shot(task)))
        vectors = vector_set(context.experiment.store, tasks)
        one_by_one = vectors.combinations(torch.eye(len(tasks), dtype=torch.float64))
        for index, (task, direction) in enumerate(zip(tasks, one_by_one, strict=True)):
            test.merge(direction, 1.0)
            rows.append(Row.of("fine-tuned", "test", 1, index, task, 1.0, test.count(task)))
        write_rows(context.store, self.name, rows, self.identity)
