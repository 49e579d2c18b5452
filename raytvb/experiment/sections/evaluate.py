"""The section `evaluate` of an experiment file: what is measured after the search has chosen."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from raytvb.experiment.fields import Count, Flag, Fraction, Frozen, Rate, Real, Whole, Words
from raytvb.experiment.sections.tasks import Task, Tasks, expanded_tasks
from raytvb.suite.task_names import CONTROL


class UnseenConfig(Frozen):
    """Tasks without a task vector.

    Coefficients of the basis vectors, and of all task vectors, are learned for them on few images.
    """

    tasks: Tasks = Field(description="The tasks, or the name of a preset.")
    shots: Count = Field(4, description="Training images of each class.")
    steps: Count = Field(30, description="Steps of Adam on the coefficients.")
    lr: Rate = Field(
        0.02,
        description=(
            "Learning rate of the coefficients. The vectors are first scaled to equal length."
        ),
    )
    batch_size: Count = Field(64, description="Images in each step.")

    def restricted(self, present: Collection[str]) -> UnseenConfig | None:
        """The section with only these tasks; None if none of them is left."""
        tasks = tuple(task for task in self.tasks if task.name in present)
        return self.model_copy(update={"tasks": tasks}) if tasks else None


class DisentanglementConfig(Frozen):
    """Weight disentanglement error of pairs of tasks, over a grid of two coefficients."""

    pairs: tuple[tuple[str, str], ...] = Field(
        (), description="Pairs of task names. Default: the first two tasks."
    )
    low: Real = Field(-1.0, ge=-1000.0, le=1000.0, description="Least coefficient of the grid.")
    high: Real = Field(2.0, ge=-1000.0, le=1000.0, description="Greatest coefficient of the grid.")
    points: Whole = Field(
        7, ge=2, le=200, description="Points on each side of the grid, low and high included."
    )

    @model_validator(mode="after")
    def _ordered(self) -> DisentanglementConfig:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self

    def restricted(self, vectors: Collection[str]) -> DisentanglementConfig | None:
        """The section with only the pairs of these tasks; None if pairs were given and none is
        left."""
        pairs = tuple(pair for pair in self.pairs if set(pair) <= set(vectors))
        if self.pairs and not pairs:
            return None
        return self.model_copy(update={"pairs": pairs})


def _control_task(given: object) -> object:
    """The name of a task, or a preset with a single task, as the fields of that task."""
    if not isinstance(given, str | dict):
        return given
    tasks = expanded_tasks(given)
    if not isinstance(tasks, list) or len(tasks) != 1:
        raise ValueError("give a single task, not a preset of several")
    return tasks[0]


def _unseen_section(given: object) -> object:
    """`unseen: [a, b]` means `unseen: {tasks: [a, b]}`."""
    return {"tasks": given} if isinstance(given, str | list | tuple) else given


def _disentanglement_section(given: object) -> object:
    """`disentanglement: true` means the defaults, and `false` means that it is not measured."""
    if isinstance(given, bool):
        return {} if given else None
    return given


class EvaluateConfig(Frozen):
    """What is measured on the test split."""

    control: Annotated[Task | None, BeforeValidator(_control_task)] = Field(
        None,
        description=(
            f"The task on which a model must stay accurate while another task is negated. Default: "
            f"{CONTROL} for the embedded model, otherwise none. `imagenet`: the validation images "
            f"of ImageNet-1k. `none`: nothing is negated."
        ),
    )
    negation: Flag = Field(True, description="Negate each task. false: nothing is negated.")
    keep: Fraction = Field(
        0.95,
        description="Share of its zero-shot accuracy that the control must keep in a negation.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description=(
            "Number format of the forward pass. bf16: use bf16 if at least 99.5 % of the answers "
            "stay the same, otherwise fp32. auto: like bf16 on GPUs, fp32 on CPUs."
        ),
    )
    additions: tuple[tuple[str, ...], ...] = Field(
        (),
        description=(
            "Lists of tasks to add, besides the seeded subsets. Each has its own coefficient."
        ),
    )
    unseen: Annotated[
        UnseenConfig | None,
        BeforeValidator(_unseen_section),
        Words("a list of tasks, or fields like `tasks:` and `shots:`"),
    ] = Field(None, description="Tasks without a task vector. Default: none.")
    disentanglement: Annotated[
        DisentanglementConfig | None,
        BeforeValidator(_disentanglement_section),
        Words("true, false, or fields like `pairs:` and `points:`"),
    ] = Field(
        None,
        description=(
            "Weight disentanglement of pairs of tasks. true: the first two tasks. Default: none."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _without_control(cls, values: object) -> object:
        """`control: none` means that nothing is negated."""
        if isinstance(values, dict) and values.get("control") == "none":
            return {**values, "control": None, "negation": False}
        return values

    def restricted(self, vectors: Collection[str], present: Collection[str]) -> EvaluateConfig:
        """What can be measured if only some tasks are there.

        vectors: names of the tasks with a vector. present: names of all tasks that are there, so
        that the control and unseen tasks are among them.
        """
        changes: dict[str, object] = {
            "additions": tuple(group for group in self.additions if set(group) <= set(vectors)),
            "unseen": None if self.unseen is None else self.unseen.restricted(present),
        }
        if self.control is not None and self.control.name not in present:
            changes["negation"] = False
        if self.disentanglement is not None:
            changes["disentanglement"] = self.disentanglement.restricted(vectors)
        return self.model_copy(update=changes)
