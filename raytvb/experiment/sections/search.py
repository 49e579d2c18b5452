"""The section `search` of an experiment file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytvb.experiment.fields import (
    Count,
    Fraction,
    Frozen,
    OneOrMany,
    Positive,
)
from raytvb.maths.merge_registry import compared_merges


class CoefficientConfig(Frozen):
    """The merge coefficient alpha. The best one is near one over the number of vectors added."""

    low: float = Field(0.0, ge=0.0, description="Least coefficient that is tried.")
    high: Positive = Field(4.0, description="Greatest coefficient that is tried.")
    strategy: Literal["line", "grid"] = Field(
        "line",
        description=(
            "How it is searched. line: coarse to fine, on multiples of one over the number of "
            "tasks added, as accuracy has one maximum. grid: `points` even steps."
        ),
    )
    points: int = Field(21, ge=2, description="Points of the grid, low and high included.")
    vector: Literal["none", "per-task", "per-basis"] = Field(
        "none",
        description=(
            "Search also a coefficient for each task, or for each basis vector, for the addition "
            "of all tasks. Optuna does it."
        ),
    )
    trials: Count = Field(60, description="How many such vectors of coefficients Optuna tries.")

    @model_validator(mode="after")
    def _ordered(self) -> CoefficientConfig:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class SearchConfig(Frozen):
    """What Ray Tune searches: every basis method at every size, coefficients within each trial."""

    sizes: Annotated[tuple[Count, ...], OneOrMany] = Field(
        (), description="Basis sizes M, at most T, the number of tasks. Default: T/4 and T/2."
    )
    objective: Literal["subsets", "all", "single"] = Field(
        "subsets",
        description=(
            "The mean accuracy by which a basis is chosen. subsets: of seeded subsets of 1, T/4, "
            "T/2 and T tasks, each added. all: of all tasks added. single: of each task alone."
        ),
    )
    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None,
        description=(
            "Choose the smallest basis whose accuracy is at most this much below the best one's "
            "(0.01: one point). Default: choose the best one."
        ),
    )
    coefficients: CoefficientConfig = Field(
        CoefficientConfig(), description="The merge coefficients that are tried."
    )
    shares: Annotated[tuple[Fraction, ...], OneOrMany] = Field(
        (0.25, 1.0),
        description=(
            "Shares of the validation images, rising to 1. Coefficients are searched on the first "
            "share; after each, the poorer methods of a size drop out."
        ),
    )
    keep: Fraction = Field(
        0.5,
        description=(
            "Share of the methods of a size that go on to the next share of images, at least two "
            "methods. 1 keeps all."
        ),
    )
    lengths: Literal["auto", "projected", "own"] = Field(
        "auto",
        description=(
            "Length of the vectors that are decoded from a basis. projected: as the projection "
            "gives them. own: scaled to the length of the task vector. auto: whichever is better "
            "on validation images, for each number of tasks added; the sum of all tasks is always "
            "as projected."
        ),
    )
    random_subsets: Count = Field(
        1, description="How many seeded draws of each random baseline there are at each size."
    )
    merges: Annotated[tuple[str, ...], OneOrMany] = Field(
        (),
        description="Other merge methods to compare with, on the full vectors and on each basis.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> SearchConfig:
        if not self.shares or list(self.shares) != sorted(set(self.shares)) or self.shares[-1] != 1:
            raise ValueError(f"shares must rise and end with 1.0, not {list(self.shares)}")
        allowed = compared_merges()
        unknown = [name for name in self.merges if name not in allowed]
        if unknown or len(set(self.merges)) < len(self.merges):
            raise ValueError(
                f"merges: {', '.join(unknown) or 'a method is given twice'}; allowed: "
                f"{', '.join(allowed)}"
            )
        return self
