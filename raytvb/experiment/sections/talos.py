"""The section `talos` of an experiment file: how the trainable parameters are chosen."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raytvb.experiment.fields import Count, Fraction, Frozen, Real, Whole


class TalosConfig(Frozen):
    """Which parameters are trained. TaLoS trains those to which the answers are least sensitive."""

    density: Fraction = Field(
        0.1,
        description=(
            "Share of the parameters that is trained. 1.0 trains all parameters, without a mask, "
            "and writes dense vectors."
        ),
    )
    mask: Literal["shared", "per-task"] = Field(
        "shared",
        description=(
            "shared: one mask from the summed scores of all tasks. per-task: a mask for each task."
        ),
    )
    select: Literal["lowest", "highest", "magnitude", "random"] = Field(
        "lowest",
        description=(
            "Which entries are trained. lowest: those of lowest sensitivity (TaLoS). For "
            "comparison: highest (sensitivity), magnitude (largest weights) and random."
        ),
    )
    rounds: Whole = Field(
        4,
        ge=1,
        le=1000,
        description=(
            "Rounds in which the mask is thinned to the density. Each round computes new scores. "
            "Used only if entries are selected by sensitivity."
        ),
    )
    damping: Real = Field(
        0.1,
        ge=0.0,
        le=1.0,
        description=(
            "Factor on the weights that earlier rounds have rejected, while a later round scores. "
            "1.0 leaves them as they are."
        ),
    )
    images: Whole = Field(
        256,
        ge=1,
        le=1_000_000_000,
        description="Training images that are scored, for each task.",
    )
    draws: Count | Literal["exact"] = Field(
        1,
        description=(
            "How many labels are drawn from the model's answer to each image. exact: use the "
            "expectation over all classes instead."
        ),
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Number format of the passes that compute the scores."
    )

    @property
    def stages(self) -> int:
        """How many rounds the mask takes.

        If entries are not selected by sensitivity, one round is enough, for damping would change
        nothing.
        """
        return self.rounds if self.select in ("lowest", "highest") else 1
