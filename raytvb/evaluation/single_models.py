"""Measures the accuracy of single models: the pretrained model, and each fine-tuned model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from raytvb.evaluation.evaluation import Context, Evaluation
from raytvb.evaluation.rows import Row, read_rows, stored_rows, write_rows
from raytvb.evaluation.store_names import SINGLE_MODELS
from raytvb.experiment.layout import vector_prefix
from raytvb.experiment.present_versions import Parents, PresentVersions
from raytvb.experiment.stored_vectors import vector_set


@dataclass(frozen=True)
class SingleModels(Evaluation):
    """Test accuracy of the pretrained model on every task, and of fine-tuned models on their tasks.

    The `model` of the rows is `zero-shot` or `fine-tuned`.
    """

    @property
    def name(self) -> str:
        """`models`."""
        return SINGLE_MODELS

    def parents(self, present: PresentVersions) -> Parents:
        """The vector and the images of each task."""
        parents = {}
        for task, checksum in present.vectors.items():
            parents[vector_prefix(task)] = checksum
            parents[f"images/{task}"] = present.images[task]
        return parents

    def run(self, context: Context) -> None:
        """Measure, and write the rows."""
        known, tasks = self._known_rows(context), context.experiment.task_names
        new = [task for task in tasks if task not in known]
        known |= self._measured(context, new) if new else {}
        rows: list[Row] = []
        for task in tasks:
            rows.append(known[task][0])
        for index, task in enumerate(tasks):
            rows.append(replace(known[task][1], subset=index))
        write_rows(context.store, self.name, rows, self.identity, self.parents(context.present))

    def _measured(self, context: Context, tasks: Sequence[str]) -> dict[str, tuple[Row, Row]]:
        """The rows of some tasks, by task: of the pretrained model, and of the fine-tuned one."""
        test = context.evaluator("test")
        zero_shot = {task: test.zero_shot(task) for task in tasks}
        vectors = vector_set(context.present.stored_vectors(context.experiment))
        # All vectors are opened, because they have common coordinates; only those with weight are
        # read.
        positions = [context.experiment.task_names.index(task) for task in tasks]
        weights = torch.eye(len(vectors.files), dtype=torch.float64)[:, positions]
        rows = {}
        for task, direction in zip(tasks, vectors.combinations(weights), strict=True):
            test.merge(direction, 1.0)
            rows[task] = (
                Row.of("zero-shot", "test", 0, 0, task, 0.0, zero_shot[task]),
                Row.of("fine-tuned", "test", 1, 0, task, 1.0, test.count(task)),
            )
        return rows

    def _known_rows(self, context: Context) -> dict[str, tuple[Row, Row]]:
        """The stored rows of those tasks whose vector and images are the same as then, by task."""
        stored = stored_rows(context.store, self.name)
        if stored is None or stored.record is None or stored.identity != self.identity:
            return {}
        wanted, before = self.parents(context.present), stored.record.parents
        rows = read_rows(context.store, self.name)
        by_model = {(row.model, row.task): row for row in rows}
        known = {}
        for task in context.experiment.task_names:
            names = (vector_prefix(task), f"images/{task}")
            zero_shot = by_model.get(("zero-shot", task))
            fine_tuned = by_model.get(("fine-tuned", task))
            is_same = all(before.get(name) == wanted[name] for name in names)
            if is_same and zero_shot is not None and fine_tuned is not None:
                known[task] = zero_shot, fine_tuned
        return known
