"""What the data of an experiment hold, for a dry run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from raytvb.data.census import Census
from raytvb.data.image_source import SPLITS
from raytvb.errors import FailedPart, PartialRunError, UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.missing import DATA, missing_parts, without
from raytvb.experiment.sections.tasks import TRAINING, TaskConfig
from raytvb.models.pretrained_task import checked_census
from raytvb.storage.contract import JsonObject
from raytvb.storage.retries import patience, set_patience
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError

MOST_THREADS = 16
"""Number of images that are decoded at the same time at most."""

PATIENCE_S = 5.0
"""For how many seconds a request is repeated. Nobody waits longer for a dry run."""

LISTED = 20
"""Of a task with more classes, only the range of images in a class is printed."""


@dataclass
class DataPlan:
    """What a run would find in the data of the tasks that it would read."""

    tasks: dict[str, Census] = field(default_factory=dict)
    """Tasks whose data can be used."""
    failed: list[FailedPart] = field(default_factory=list)
    """Tasks whose data cannot be used."""

    def to_json(self) -> JsonObject:
        """The plan as JSON values: `tasks`, and `failed` with the reasons by task."""
        tasks: JsonObject = {name: census.to_json() for name, census in self.tasks.items()}
        failed: JsonObject = {part.name: part.reason for part in self.failed}
        return {"tasks": tasks, "failed": failed}

    def lines(self) -> Iterator[str]:
        """The plan as lines of text."""
        for name, census in self.tasks.items():
            yield f"data      {name}"
            for line in (*_images(census), *census.lines()):
                yield f"            {line}"

    def raise_failed(self, experiment: Experiment) -> None:
        """Raise PartialRunError that lists the tasks that a run would leave out, and UserError if
        it would leave out all.
        """
        if not self.failed:
            return
        if not without(experiment, self.failed).tasks:
            raise UserError("no task can be used:\n  " + "\n  ".join(map(str, self.failed)))
        raise PartialRunError("a run would leave these out:", self.failed)


def plan_data(experiment: Experiment) -> DataPlan:
    """Look at the data of all tasks, the control and unseen ones included. Nothing is written.

    Every image is decoded, as a run does before it trains, but not the images of tasks that have a
    vector already. If their data cannot be read any more, a warning says so.
    """
    before = patience()
    set_patience(min(before, PATIENCE_S))
    try:
        return _looked_at(experiment)
    finally:
        set_patience(before)


def _looked_at(experiment: Experiment) -> DataPlan:
    missing = {part.name for part in missing_parts(Store(experiment.store), experiment, {})}
    with_vectors = set(experiment.task_names)
    is_done = not missing & with_vectors
    plan, known = DataPlan(), dict[tuple[TaskConfig, bool], Census]()
    needed = {split: set(experiment.tasks_with(split)) for split in SPLITS}
    for task in experiment.every_task:
        splits = [split for split in SPLITS if task in needed[split]]
        has_vector = is_done or (task.name in with_vectors and task.name not in missing)
        try:
            plan.tasks[task.name] = _census(experiment, task, splits, not has_vector, known)
        except (UserError, OSError) as error:  # OSError: no access, or a damaged Parquet page
            if isinstance(error, StoreError):
                set_patience(0.0)  # more tasks may lie on a server that does not answer
            reason = str(error).removeprefix(f"task {task.name}: ")
            if has_vector:
                gone = f"its data cannot be read any more, but what a run needs is stored: {reason}"
                plan.tasks[task.name] = Census({}, warnings=[gone])
            else:
                plan.failed.append(FailedPart(task.name, DATA, reason))
    return plan


def _census(
    experiment: Experiment,
    task: TaskConfig,
    splits: list[str],
    decode: bool,
    known: dict[tuple[TaskConfig, bool], Census],
) -> Census:
    """The census of a task. known: those of tasks with the same data and the same prompts."""
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    if task.data is None:
        return checked_census(experiment, task, splits, threads)
    key = task.model_copy(update=dict.fromkeys(TRAINING) | {"name": "-".join(splits)}), decode
    if key not in known:
        known[key] = checked_census(experiment, task, splits, threads, decode=decode)
    return known[key]


def _images(census: Census) -> Iterator[str]:
    """One line for each split: its images, by class unless there are many classes."""
    for split in SPLITS:
        counts = {name: each[split] for name, each in census.classes.items() if split in each}
        if not counts:
            continue
        if len(counts) <= LISTED:
            by_class = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        else:
            least, most = min(counts.values()), max(counts.values())
            by_class = f"{least:,} to {most:,} in each of {len(counts):,} classes"
        yield f"{split} {census.count(split):,}: {by_class}"
