"""The section `resources` of an experiment file: what changes no result."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raytvb.experiment.fields import (
    Count,
    Frozen,
)


class ResourceConfig(Frozen):
    """The resources of the run. None of them changes a result."""

    cpus_per_task: float = Field(1.0, ge=0.0, description="CPUs of a Ray task.")
    gpus_per_task: float = Field(
        0.0, ge=0.0, description="GPUs of a Ray task. 0.25: four tasks share a GPU."
    )
    memory_gb_per_task: float | None = Field(
        None,
        ge=0.0,
        description=(
            "Memory of a Ray task in GB: no more tasks run at once than fit into a node's memory. "
            "null: an estimate from the size of the model."
        ),
    )
    max_retries: int = Field(
        20, ge=0, description="How often a task is restarted after its worker or node has died."
    )
    checkpoint_s: float = Field(
        300.0, gt=0.0, description="Seconds between the checkpoints of a fine-tune."
    )
    concurrent_trials: int = Field(
        0,
        ge=0,
        description="Trials of the search that run at once. 0: as many as the cluster can run.",
    )
    shards: Count = Field(
        1,
        description=(
            "Actors that build the bases together. Each has a part of the vectors' coordinates."
        ),
    )
    cache: Literal["auto", "memory", "disk"] = Field(
        "auto",
        description=(
            "Where these actors keep the vectors' values. auto: in memory up to 1 GB for each "
            "actor, else in a file under $TMPDIR."
        ),
    )
    wait_s: float = Field(
        0.0,
        ge=0.0,
        description="Seconds to wait until an autoscaler has added the resources.",
    )

    storage_timeout_s: float = Field(
        300.0,
        ge=0.0,
        description="Seconds for which a failing request to the storage is tried again.",
    )

    @model_validator(mode="after")
    def _whole_above_one(self) -> ResourceConfig:
        for name, value in (("cpus", self.cpus_per_task), ("gpus", self.gpus_per_task)):
            if value > 1 and value != int(value):
                raise ValueError(
                    f"{name}_per_task = {value}: Ray takes fractions below 1 and whole "
                    f"numbers above"
                )
        return self
