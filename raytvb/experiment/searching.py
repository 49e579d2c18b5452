"""Bases, their search and what is evaluated, in an experiment file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raytvb.experiment.base import Count, Fraction, Frozen, Positive
from raytvb.experiment.tasks import TaskConfig, expanded_tasks
from raytvb.maths.basis_methods import METHODS
from raytvb.maths.merge_methods import MERGE
from raytvb.maths.online_basis import ONLINE_METHODS
from raytvb.suite import glyphs

MERGES = tuple(
    name for name in MERGE if name not in ("sum", "fisher")
)  # fisher needs what a store has not


class BasisConfig(Frozen):
    """Which bases are built: one method or several."""

    method: tuple[str, ...] = ("ae",)
    prepare: Literal["none", "trimmed", "dropped", "sparsified"] = Field(
        "none",
        description=(
            "what bases are made of: the task vectors, or those trimmed as in TIES, with dropped entries (DARE) or without "
            "both tails (Breadcrumbs)"
        ),
    )
    online: bool = Field(
        False,
        description=(
            f"also bases that see each vector once, in bounded memory ({', '.join(ONLINE_METHODS)})"
        ),
    )
    buffer: Count = Field(
        1, description="vectors that an online basis takes in at a time; it holds M and these"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_or_many(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("method"), str):
            values = {**values, "method": (values["method"],)}
        if isinstance(values, dict) and isinstance(values.get("method"), list):
            values = {**values, "method": tuple(dict.fromkeys(map(str, values["method"])))}
        return values

    @model_validator(mode="after")
    def _known(self) -> BasisConfig:
        unknown = [m for m in self.method if m not in METHODS]
        if unknown or not self.method:
            raise ValueError(
                f"unknown method {', '.join(unknown) or '(none given)'}; allowed: {', '.join(METHODS)}"
            )
        if self.online and not set(self.method) & set(ONLINE_METHODS):
            raise ValueError(
                f"online: none of the methods {', '.join(self.method)} can be online; "
                f"those that can: {', '.join(ONLINE_METHODS)}"
            )
        return self


class CoefficientConfig(Frozen):
    """The merge coefficient alpha, from `low` to `high`. The best one is near one over the number
    of vectors added.
    """

    low: float = Field(0.0, ge=0.0)
    high: Positive = 4.0
    strategy: Literal["line", "grid"] = Field(
        "line",
        description=(
            "line: a coarse-to-fine search for the one maximum, on multiples of 1/size; grid: `points` even steps"
        ),
    )
    points: int = Field(21, ge=2, description="of the grid, low and high included")
    vector: Literal["none", "per-task", "per-basis"] = Field(
        "none",
        description=(
            "also a coefficient for each task, or each basis vector, for the addition of all tasks (Optuna)"
        ),
    )
    trials: Count = Field(60, description="that Optuna tries for such a vector")

    @model_validator(mode="after")
    def _ordered(self) -> CoefficientConfig:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class SearchConfig(Frozen):
    """What Ray Tune searches: every basis method at every size, coefficients within each trial."""

    sizes: tuple[Count, ...] = Field(
        (), description="basis sizes M, at most T; default: a quarter and half of T"
    )
    objective: Literal["subsets", "all", "single"] = "subsets"
    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None,
        description=(
            "choose the smallest basis whose accuracy is at most this below the best one's (0.01: one point); default: the "
            "best one"
        ),
    )
    coefficients: CoefficientConfig = CoefficientConfig()
    shares: tuple[Fraction, ...] = Field(
        (0.25, 1.0),
        description=(
            "parts of the validation images, rising to 1: the coefficient is searched on the first, and the poorer methods "
            "of a size end there"
        ),
    )
    keep: Fraction = Field(
        0.5,
        description=(
            "part of the methods of a size that go on to the next share, at least two; 1: all"
        ),
    )
    lengths: Literal["auto", "projected", "own"] = Field(
        "auto",
        description=(
            "of what is decoded from a basis: as the projection has it, or that of the task vector; auto: what is better "
            "on validation images, for each number of tasks added but all, whose projected sum it keeps"
        ),
    )
    random_subsets: Count = Field(1, description="draws of the random baselines at each size")
    merges: tuple[str, ...] = Field(
        (),
        description=(
            f"other merge methods to compare with, on the full vectors and on each basis: {', '.join(MERGES)}"
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _one_or_many(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return values | {
                k: (values[k],)
                for k in ("merges", "sizes", "shares")
                if isinstance(values.get(k), str | int | float)
            }
        return values

    @model_validator(mode="after")
    def _consistent(self) -> SearchConfig:
        if (
            not self.shares
            or list(self.shares) != sorted(set(self.shares))
            or self.shares[-1] != 1.0
        ):
            raise ValueError(f"shares must rise and end with 1.0, not {list(self.shares)}")
        unknown = [m for m in self.merges if m not in MERGES]
        if unknown or len(set(self.merges)) < len(self.merges):
            raise ValueError(
                f"merges: {', '.join(unknown) or 'a method is given twice'}; allowed: {', '.join(MERGES)}"
            )
        return self


class UnseenConfig(Frozen):
    """Tasks without a vector: coefficients of the basis vectors, and of all task vectors, learned
    on few images.
    """

    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    shots: Count = Field(4, description="training images of each class")
    steps: Count = 30
    lr: Positive = Field(
        0.02, description="of Adam on coefficients of vectors that are scaled to equal length"
    )
    batch_size: Count = 64

    @model_validator(mode="before")
    @classmethod
    def _names(cls, values: Any) -> Any:
        if isinstance(values, dict) and "tasks" in values:
            given = values["tasks"]
            given = given if isinstance(given, list | tuple) else [given]
            return {**values, "tasks": [made for task in given for made in expanded_tasks(task)]}
        return values


class DisentanglementConfig(Frozen):
    """Weight disentanglement error of pairs of tasks, over a grid of two coefficients."""

    pairs: tuple[tuple[str, str], ...] = Field(
        (), description="names of tasks; default: the first two"
    )
    low: float = -1.0
    high: float = 2.0
    points: int = Field(7, ge=2, description="of each coefficient, low and high included")

    @model_validator(mode="after")
    def _ordered(self) -> DisentanglementConfig:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class EvaluateConfig(Frozen):
    """What is measured on the test split. Negation's control must keep 95 % of its zero-shot
    accuracy.
    """

    control: TaskConfig | None = Field(
        None,
        description=(
            f"default: {glyphs.CONTROL} on the embedded model, else none; imagenet: the ImageNet-1k validation images"
        ),
    )
    negation: bool = Field(True, description="false, or `control: none`: nothing is negated")
    keep: Fraction = 0.95
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description=(
            "of the forward pass: bf16 where it keeps 99.5 % of the answers, else fp32; auto: tries bf16 on GPUs only"
        ),
    )
    additions: tuple[tuple[str, ...], ...] = Field(
        (),
        description=(
            "lists of tasks to add, beside the seeded subsets: each with its own coefficient"
        ),
    )
    unseen: UnseenConfig | None = None
    disentanglement: DisentanglementConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        control = values.get("control")
        if control == "none":
            values = {**values, "control": None, "negation": False}
        elif isinstance(control, str) or (isinstance(control, dict) and "preset" in control):
            found = expanded_tasks(control)
            if len(found) != 1:
                raise ValueError("control: one task, not the tasks of a preset")
            values = {**values, "control": found[0]}
        unseen = values.get("unseen")
        if isinstance(unseen, str | list | tuple):
            values = {**values, "unseen": {"tasks": unseen}}
        if isinstance(values.get("disentanglement"), bool):
            values = {**values, "disentanglement": {} if values["disentanglement"] else None}
        return values
