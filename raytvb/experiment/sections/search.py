"""The section `search` of an experiment file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytvb.errors import listed, shortened
from raytvb.experiment.fields import Count, Fraction, Frozen, OneOrMany, Real, Whole
from raytvb.maths.merge_registry import compared_merges


class CoefficientConfig(Frozen):
    """The merge coefficient alpha. Its best value is near one over the number of vectors added."""

    low: Real = Field(0.0, ge=0.0, le=1000.0, description="Least coefficient that is tried.")
    high: Real = Field(4.0, gt=0.0, le=1000.0, description="Greatest coefficient that is tried.")
    strategy: Literal["line", "grid"] = Field(
        "line",
        description=(
            "How the coefficient is searched. line: from coarse to fine, on multiples of one over "
            "the number of tasks added; this assumes that accuracy has a single maximum. grid: "
            "`points` values at even steps."
        ),
    )
    points: Whole = Field(
        21, ge=2, le=10_000, description="Points of the grid, low and high included."
    )
    vector: Literal["none", "per-task", "per-basis"] = Field(
        "none",
        description=(
            "Let Optuna also search a coefficient for each task, or for each basis vector, for the "
            "addition of all tasks."
        ),
    )
    trials: Whole = Field(
        60, ge=1, le=100_000, description="How many vectors of coefficients Optuna tries."
    )

    @model_validator(mode="after")
    def _ordered(self) -> CoefficientConfig:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class SearchConfig(Frozen):
    """What Ray Tune searches: a trial for every basis method and size, which finds coefficients."""

    sizes: Annotated[tuple[Count, ...], OneOrMany] = Field(
        (), description="Basis sizes M, at most T, the number of tasks. Default: T/4 and T/2."
    )
    objective: Literal["subsets", "all", "single"] = Field(
        "subsets",
        description=(
            "The mean accuracy by which a basis is chosen. subsets: after adding seeded subsets of "
            "1, T/4, T/2 and T tasks. all: after adding all tasks. single: after adding each task "
            "alone."
        ),
    )
    tolerance: Annotated[Real, Field(ge=0.0, lt=1.0)] | None = Field(
        None,
        description=(
            "Choose the smallest basis whose accuracy is at most this much below that of the best "
            "basis (0.01: one point). Default: choose the best basis."
        ),
    )
    coefficients: CoefficientConfig = Field(
        CoefficientConfig(), description="The merge coefficients that are tried."
    )
    shares: Annotated[tuple[Fraction, ...], OneOrMany] = Field(
        (0.25, 1.0),
        description=(
            "Shares of the validation images, rising to 1. Coefficients are searched on the first "
            "share. After each share, the poorer methods of a size drop out."
        ),
    )
    keep: Fraction = Field(
        0.5,
        description=(
            "Share of the methods of a size that go on to the next share of images. At least two "
            "methods go on. 1 keeps all."
        ),
    )
    lengths: Literal["auto", "projected", "own"] = Field(
        "auto",
        description=(
            "Length of the vectors that are decoded from a basis. projected: as the projection "
            "gives them. own: scaled to the length of the task vector. auto: whichever is better "
            "on validation images, for each number of tasks added; always projected for the sum of "
            "all tasks."
        ),
    )
    random_subsets: Whole = Field(
        1,
        ge=1,
        le=1000,
        description="How many seeded draws each random baseline has at each size.",
    )
    merges: Annotated[tuple[str, ...], OneOrMany] = Field(
        (),
        description="Other merge methods to compare, on the full vectors and on each basis.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> SearchConfig:
        if not self.shares or list(self.shares) != sorted(set(self.shares)) or self.shares[-1] != 1:
            raise ValueError(
                f"shares must rise and end with 1.0, not {shortened(list(self.shares))}"
            )
        allowed = compared_merges()
        unknown = [name for name in self.merges if name not in allowed]
        if unknown or len(set(self.merges)) < len(self.merges):
            raise ValueError(
                f"merges: {listed(unknown) or 'a method is given twice'}; allowed: "
                f"{', '.join(allowed)}"
            )
        return self
