"""The experiment file as frozen, validated objects, with all defaults filled in.

A field belongs to the identity or to the execution of an experiment. Identity (model, tasks, seed,
hyperparameters) says what is computed, and is frozen in the store at the first run. Execution
(`store`, `resources`) says where and how it is computed, and changes no result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from pydantic import Field, PrivateAttr, model_validator

from raytvb.experiment.fields import Frozen
from raytvb.experiment.sections.basis import BasisConfig
from raytvb.experiment.sections.evaluate import EvaluateConfig
from raytvb.experiment.sections.finetune import FinetuneConfig
from raytvb.experiment.sections.model import ModelConfig
from raytvb.experiment.sections.resources import ResourceConfig
from raytvb.experiment.sections.search import SearchConfig
from raytvb.experiment.sections.talos import TalosConfig
from raytvb.experiment.sections.tasks import TaskConfig, Tasks
from raytvb.storage.contract import JsonObject

NOT_IDENTITY = ("name", "store", "resources")
"""Fields that change no result."""


class Experiment(Frozen):
    """Everything an experiment file can say."""

    name: str = Field(
        "experiment",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="A name for the report.",
    )
    store: str = Field(
        min_length=1,
        description="Where results are kept: a folder, or any fsspec URL (s3://bucket/prefix).",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of all random numbers.")
    model: ModelConfig = Field(ModelConfig(), description="The pretrained model.")
    tasks: Tasks = Field(description="The tasks to make vectors for, or the name of a preset.")
    talos: TalosConfig = Field(TalosConfig(), description="Which parameters are trained.")
    finetune: FinetuneConfig = Field(FinetuneConfig(), description="How the tasks are fine-tuned.")
    basis: BasisConfig = Field(BasisConfig(), description="Which bases are built.")
    search: SearchConfig = Field(SearchConfig(), description="How a basis is chosen.")
    evaluate: EvaluateConfig = Field(
        EvaluateConfig(), description="What is measured on the test split."
    )
    resources: ResourceConfig = Field(
        ResourceConfig(), description="The resources that Ray gives to each task."
    )

    _missing: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _different_names(self) -> Experiment:
        repeated = _repeated(self.task_names)
        if repeated:
            raise ValueError(f"tasks: given more than once: {', '.join(sorted(repeated))}")
        names = {task.name for task in self.every_task}
        for name in names:
            for folder in _folders_above(name):
                if folder in names:
                    raise ValueError(
                        f"tasks: {folder} and {name}: one task's name is the folder of another's "
                        f"(control and unseen tasks included)"
                    )
        return self

    @model_validator(mode="after")
    def _known_groups(self) -> Experiment:
        self._check_groups("evaluate.additions", self.evaluate.additions)
        self._check_groups("evaluate.disentanglement.pairs", self.pairs)
        return self

    def _check_groups(self, field: str, groups: tuple[tuple[str, ...], ...]) -> None:
        names = set(self.task_names)
        for group in groups:
            others = [name for name in group if name not in names]
            if others or not group or _repeated(group):
                reason = f"; unknown: {', '.join(others)}" if others else ""
                raise ValueError(
                    f"{field}: [{', '.join(group)}]: give different tasks of the experiment{reason}"
                )

    @model_validator(mode="after")
    def _unseen_tasks(self) -> Experiment:
        for task in self.unseen:
            if self.control is not None and task.name == self.control.name and task != self.control:
                raise ValueError(
                    f"evaluate: the control and an unseen task are both called {task.name}, but "
                    f"differ"
                )
        names = [task.name for task in self.unseen]
        seen = sorted(set(names) & set(self.task_names))
        if seen:
            raise ValueError(
                f"evaluate.unseen.tasks: {', '.join(seen)}: these tasks have vectors; name others"
            )
        if _repeated(names):
            raise ValueError("evaluate.unseen.tasks: the same name is given twice")
        return self

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks in order.

        The task at position t has row t of every Gram matrix and coefficient table.
        """
        return tuple(task.name for task in self.tasks)

    @property
    def own_masks(self) -> bool:
        """Whether every task has a mask of its own."""
        return self.talos.mask == "per-task" and self.talos.density < 1.0

    @property
    def control(self) -> TaskConfig | None:
        """The control task of negation; None if nothing is negated."""
        return self.evaluate.control if self.evaluate.negation else None

    def tasks_with(self, split: str) -> tuple[TaskConfig, ...]:
        """The tasks whose images of a split are needed. Each name appears once.

        Tasks with a vector need all splits. The control needs val and test. Unseen tasks need train
        and test.
        """
        needed = list(self.tasks)
        if self.control is not None and split != "train":
            needed.append(self.control)
        if split != "val":
            needed += self.unseen
        by_name: dict[str, TaskConfig] = {}
        for task in needed:
            by_name.setdefault(task.name, task)
        return tuple(by_name.values())

    @property
    def every_task(self) -> tuple[TaskConfig, ...]:
        """The tasks with a vector, the control and the unseen tasks. Each name appears once."""
        return self.tasks_with("test")

    @property
    def unseen(self) -> tuple[TaskConfig, ...]:
        """The tasks without a vector. Coefficients of other vectors are learned for them."""
        return () if self.evaluate.unseen is None else self.evaluate.unseen.tasks

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs of tasks whose weight disentanglement is measured.

        Default: the first two tasks.
        """
        section = self.evaluate.disentanglement
        if section is None or len(self.tasks) < 2:
            return ()
        return section.pairs or ((self.tasks[0].name, self.tasks[1].name),)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the tasks that `restricted` has left out."""
        return self._missing

    def restricted(self, present: Collection[str]) -> Experiment:
        """The experiment with only those tasks whose names are in `present`.

        The control and unseen tasks are restricted, too. Additions and pairs that name a task that
        is left out are left out themselves, and so are basis sizes that are no longer smaller than
        the number of tasks.
        """
        tasks = tuple(task for task in self.tasks if task.name in present)
        search = self.search
        if len(tasks) < len(self.tasks):
            sizes = tuple(size for size in search.sizes if size < len(tasks))
            search = search.model_copy(update={"sizes": sizes})
        evaluate = self.evaluate.restricted({task.name for task in tasks}, present)
        changes = {"tasks": tasks, "search": search, "evaluate": evaluate}
        experiment = self.model_copy(update=changes)
        left_out = {*self._missing, *self.task_names} - set(experiment.task_names)
        experiment._missing = tuple(sorted(left_out))
        return experiment

    def identity(self) -> JsonObject:
        """What the experiment computes, as plain JSON values, with every default filled in."""
        return self.model_dump(mode="json", exclude=set(NOT_IDENTITY))


def _folders_above(name: str) -> list[str]:
    """The folders above a task's name: `a` and `a/b` for `a/b/c`."""
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def half(count: int) -> int:
    """The basis size M = T/2 at which every method is reported: max(1, round(T/2))."""
    return max(1, round(count / 2))


def quarter(count: int) -> int:
    """The basis size M = T/4: max(1, round(T/4))."""
    return max(1, round(count / 4))
