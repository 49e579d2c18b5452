"""The experiment file: YAML to frozen, validated objects, every default resolved.

Fields are identity or execution. Identity (model, tasks, seeds, hyperparameters) says what is
computed and is frozen in the store at the first run; execution (`store`, `resources`) says where
and how, and changes no result.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from raytvb.experiment.base import Frozen
from raytvb.experiment.searching import BasisConfig, EvaluateConfig, SearchConfig
from raytvb.experiment.tasks import TaskConfig, expanded_tasks
from raytvb.experiment.training import FinetuneConfig, ModelConfig, ResourceConfig, TalosConfig

EXECUTION_FIELDS = ("store", "resources")


class Experiment(Frozen):
    """Everything an experiment file can say. `store` is a local directory or any fsspec URL
    (s3://bucket/prefix).
    """

    name: str = Field("experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    store: str = Field(min_length=1)
    seed: int = Field(0, ge=0, lt=2**31)
    model: ModelConfig = ModelConfig()
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    talos: TalosConfig = TalosConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    basis: BasisConfig = BasisConfig()
    search: SearchConfig = SearchConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    resources: ResourceConfig = ResourceConfig()

    @model_validator(mode="before")
    @classmethod
    def _task_names(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("tasks"), list | tuple | str | dict):
            given = values["tasks"]
            given = given if isinstance(given, list | tuple) else [given]
            return {**values, "tasks": [made for task in given for made in expanded_tasks(task)]}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        names = [t.name for t in self.tasks]
        repeated = sorted({n for n in names if names.count(n) > 1})
        if repeated:
            raise ValueError(f"tasks: given more than once: {', '.join(repeated)}")
        every = {t.name for t in self.every_task}
        if any(b.startswith(a + "/") for a in every for b in every):
            raise ValueError(
                "tasks: one task's name is the folder of another's (control and unseen tasks included)"
            )
        for field, groups in (
            ("evaluate.additions", self.evaluate.additions),
            ("evaluate.disentanglement.pairs", self.pairs),
        ):
            for group in groups:
                wrong = [n for n in group if n not in names]
                if wrong or not group or len(set(group)) < len(group):
                    raise ValueError(
                        f"{field}: [{', '.join(group)}]: give different tasks of the experiment"
                        + (f"; {', '.join(wrong)} is none" if wrong else "")
                    )
        control = self.control
        if control is not None and any(
            t.name == control.name and t != control for t in self.unseen
        ):
            raise ValueError(
                f"evaluate: the control and an unseen task are both called {control.name}, but differ"
            )
        unseen = [t.name for t in self.unseen]
        both = [n for n in unseen if n in names]
        if both or len(set(unseen)) < len(unseen):
            raise ValueError(
                f"evaluate.unseen.tasks: {', '.join(both) or 'a name is given twice'}"
                + (": these have task vectors; name others" if both else "")
            )
        return self

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks in order; position t is row t of every Gram matrix and coefficient
        table.
        """
        return tuple(t.name for t in self.tasks)

    @property
    def own_masks(self) -> bool:
        """Every task has a mask of its own."""
        return self.talos.mask == "per-task" and self.talos.density < 1.0

    @property
    def control(self) -> TaskConfig | None:
        """The control of negation; None where nothing is negated."""
        return self.evaluate.control if self.evaluate.negation else None

    def tasks_with(self, split: str) -> tuple[TaskConfig, ...]:
        """The tasks whose images of a split are needed: also the control's but for train, and the
        unseen ones' but for val."""
        control = (self.control,) if self.control is not None and split != "train" else ()
        extra = (*control, *(() if split == "val" else self.unseen))
        named = {
            t.name: t for t in (*reversed(extra), *self.tasks)
        }  # of the same name the first one
        return (*self.tasks, *(t for t in extra if named[t.name] is t))

    @property
    def every_task(self) -> tuple[TaskConfig, ...]:
        """The tasks, the control where there is one that is not a task itself, and the unseen
        tasks.
        """
        return self.tasks_with("test")

    @property
    def unseen(self) -> tuple[TaskConfig, ...]:
        """Tasks without a task vector, that coefficients are learned for."""
        return () if self.evaluate.unseen is None else self.evaluate.unseen.tasks

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Pairs of tasks whose weight disentanglement is measured."""
        asked = self.evaluate.disentanglement
        if asked is None or len(self.tasks) < 2:
            return ()
        return asked.pairs or ((self.tasks[0].name, self.tasks[1].name),)

    def identity(self) -> dict[str, Any]:
        """What the experiment computes, as plain JSON values, with every default filled in."""
        return self.model_dump(mode="json", exclude=set(EXECUTION_FIELDS) | {"name"})


def half(count: int) -> int:
    """Basis size M = T/2 that every method is reported at: max(1, round(T/2))."""
    return max(1, round(count / 2))


def quarter(count: int) -> int:
    """Basis size M = T/4: max(1, round(T/4))."""
    return max(1, round(count / 4))
