"""The experiment file as frozen, validated objects, with all defaults filled in.

A field belongs to the identity or to the execution of an experiment. Identity (model, tasks, seed,
hyperparameters) says what is computed, and is recorded in the store at each run. Execution
(`store`, `resources`) says where and how it is computed, and changes no result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Annotated

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from raytvb.errors import listed
from raytvb.experiment.fields import LONGEST_NAME, Frozen, Place, Seed, Words
from raytvb.experiment.sections.basis import BasisConfig
from raytvb.experiment.sections.data import DataConfig
from raytvb.experiment.sections.evaluate import EvaluateConfig
from raytvb.experiment.sections.finetune import FinetuneConfig
from raytvb.experiment.sections.model import ModelConfig
from raytvb.experiment.sections.resources import ResourceConfig
from raytvb.experiment.sections.search import SearchConfig
from raytvb.experiment.sections.talos import TalosConfig
from raytvb.experiment.sections.tasks import TaskConfig, Tasks
from raytvb.storage.addresses import check_shared
from raytvb.storage.contract import JsonObject
from raytvb.storage.store_errors import StoreError

NOT_IDENTITY = ("name", "store", "vectors", "resources")
"""Fields that change no result."""


def _library_place(url: str) -> str:
    """The URL of a store to read from. Raises ValueError if the workers could not read it."""
    try:
        check_shared(url)
    except StoreError as error:
        raise ValueError(str(error)) from None
    return url


def _store_place(url: str) -> str:
    """The URL of a store. Raises ValueError if the workers of a run could not write it."""
    try:
        check_shared(url, written=True)
    except StoreError as error:
        raise ValueError(str(error)) from None
    return url


class Experiment(Frozen):
    """Everything an experiment file can say."""

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=LONGEST_NAME),
        Words(
            f"a name of at most {LONGEST_NAME} letters a-z, digits, '.', '_' and '-' that begins "
            f"with a letter or digit"
        ),
    ] = Field("experiment", description="A name for the report.")
    store: Annotated[
        Place,
        AfterValidator(_store_place),
        Words("a folder, or a URL like s3://bucket/prefix"),
    ] = Field(
        description="Where results are kept: a folder, or any fsspec URL (s3://bucket/prefix).",
    )
    vectors: (
        Annotated[
            Place,
            AfterValidator(_library_place),
            Words("a folder, or a URL like s3://bucket/prefix"),
        ]
        | None
    ) = Field(
        None,
        description=(
            "Another store, whose task vectors are used where they are. It is only read. A task "
            "that it has no vector of is fine-tuned, and its vector goes to `store`."
        ),
    )
    seed: Seed = Field(0, description="Seed of all random numbers.")
    model: ModelConfig = Field(ModelConfig(), description="The pretrained model.")
    tasks: Tasks = Field(description="The tasks to make vectors for, or the name of a preset.")
    data: DataConfig = Field(DataConfig(), description="How the images of all tasks are read.")
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
            raise ValueError(f"tasks: given more than once: {listed(sorted(repeated))}")
        names = [task.name for task in self.every_task]
        _check_twins(names)
        _check_folders(names)
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
                reason = f"; unknown: {listed(others)}" if others else ""
                raise ValueError(
                    f"{field}: [{listed(group)}]: give different tasks of the experiment{reason}"
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
                f"evaluate.unseen.tasks: {listed(seen)}: these tasks have vectors; name others"
            )
        if _repeated(names):
            raise ValueError("evaluate.unseen.tasks: the same name is given twice")
        return self

    @model_validator(mode="after")
    def _training_of_tasks(self) -> Experiment:
        for task in self.tasks:
            _check_parts(task, self.finetune)
        if self.control is not None and self.control not in self.tasks:
            _check_untrained("evaluate.control", self.control)
        for task in self.unseen:
            _check_untrained("evaluate.unseen.tasks", task)
        return self

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks in order.

        The task at position t has row t of every Gram matrix and coefficient table.
        """
        return tuple(task.name for task in self.tasks)

    @property
    def shares_mask(self) -> bool:
        """Whether all tasks share one mask."""
        return self.talos.mask == "shared" and self.talos.density < 1.0

    def finetune_of(self, task: TaskConfig) -> FinetuneConfig:
        """How a task is fine-tuned: its own settings, and those of `finetune` for the others."""
        own = {name: value for name, value in task.training().items() if name != "seed"}
        return self.finetune.model_copy(update=own)

    def seed_of(self, task: TaskConfig) -> int:
        """The seed from which the seed of a task's training is made (`task_seed`)."""
        return self.seed if task.seed is None else task.seed

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
        identity: JsonObject = self.model_dump(mode="json", exclude={*NOT_IDENTITY, "data"})
        reading = self.data.identity()
        return {**identity, "data": reading} if reading else identity


def _on_disk(name: str) -> str:
    """What a name is on the least exact disks: in lower case, without dots at the end."""
    return "/".join(part.rstrip(".") for part in name.lower().split("/"))


def _check_twins(names: Sequence[str]) -> None:
    """Raise ValueError if two tasks would share a folder on some disks."""
    known: dict[str, str] = {}
    for name in names:
        twin = known.setdefault(_on_disk(name), name)
        if twin != name:
            raise ValueError(
                f"tasks: {twin} and {name}: the names differ only in upper and lower case, or in "
                f"dots at the end, which many disks do not tell apart (control and unseen tasks "
                f"included): rename one"
            )


def _check_folders(names: Sequence[str]) -> None:
    """Raise ValueError if a task would lie in the folder of another one, on any disk."""
    tasks = {_on_disk(name): name for name in names}
    folders: dict[str, str] = {}
    for name in names:
        for folder in _folders_above(name):
            outer = tasks.get(_on_disk(folder))
            if outer is not None:
                raise ValueError(
                    f"tasks: {outer} and {name}: one task's name is the folder of another's "
                    f"(control and unseen tasks included): rename one"
                )
            twin = folders.setdefault(_on_disk(folder), folder)
            if twin != folder:
                raise ValueError(
                    f"tasks: {twin}/ and {folder}/: these folders differ only in upper and lower "
                    f"case, or in dots at the end, which many disks do not tell apart: rename one"
                )


def _folders_above(name: str) -> list[str]:
    """The folders above a task's name: `a` and `a/b` for `a/b/c`."""
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _check_parts(task: TaskConfig, finetune: FinetuneConfig) -> None:
    """Raise ValueError if a batch of a task would be computed in more parts than it has images."""
    parts, images = task.accumulate or finetune.accumulate, task.batch_size or finetune.batch_size
    if parts > images:
        of_parts = "accumulate" if task.accumulate else "finetune.accumulate"
        of_images = "its batch_size" if task.batch_size else "finetune.batch_size"
        raise ValueError(f"tasks: {task.name}: {of_parts} = {parts}: at most {images}, {of_images}")


def _check_untrained(field: str, task: TaskConfig) -> None:
    """Raise ValueError if a task that is never fine-tuned has training fields.

    `epochs` is let through, as presets give it.
    """
    given = [name for name in task.training() if name != "epochs"]
    if given:
        raise ValueError(f"{field}: {task.name} is not fine-tuned: leave out {listed(given)}")


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def half(count: int) -> int:
    """The basis size M = T/2 at which every method is reported: max(1, round(T/2))."""
    return max(1, round(count / 2))


def quarter(count: int) -> int:
    """The basis size M = T/4: max(1, round(T/4))."""
    return max(1, round(count / 4))
