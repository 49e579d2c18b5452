"""The section `resources` of an experiment file: what changes no result."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raytvb.experiment.fields import YEAR_S, Flag, Frozen, Real, Seconds, Whole


class ResourceConfig(Frozen):
    """The resources of the run. None of them changes a result."""

    cpus_per_task: Real = Field(1.0, ge=0.0, le=10_000.0, description="CPUs of a Ray task.")
    gpus_per_task: Real = Field(
        0.0, ge=0.0, le=10_000.0, description="GPUs of a Ray task. 0.25: four tasks share a GPU."
    )
    memory_gb_per_task: Real | None = Field(
        None,
        ge=0.0,
        le=1e6,
        description=(
            "Memory of a Ray task in GB: no more tasks run at once than fit into a node's memory. "
            "null: an estimate from the size of the model."
        ),
    )
    max_retries: Whole = Field(
        20,
        ge=0,
        le=1_000_000,
        description="How often a task is restarted after its worker or node has died.",
    )
    checkpoint_s: Real = Field(
        300.0,
        gt=0.0,
        le=float(YEAR_S),
        description="Seconds between the checkpoints of a fine-tune.",
    )
    concurrent_trials: Whole = Field(
        0,
        ge=0,
        le=100_000,
        description="Trials of the search that run at once. 0: as many as the cluster can run.",
    )
    shards: Whole = Field(
        1,
        ge=1,
        le=10_000,
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
    wait_s: Seconds = Field(
        0.0, description="Seconds to wait until an autoscaler has added the resources."
    )
    storage_timeout_s: Seconds = Field(
        300.0, description="Seconds for which a failing request to the storage is tried again."
    )
    anonymous: Flag = Field(
        False,
        description=(
            "Send requests to S3 without credentials, for public buckets. The store is then a "
            "folder, or a bucket that everybody may write."
        ),
    )

    def apply_to_storage(self) -> None:
        """Set how this process uses the storage. Called where work enters a process."""
        # Imported here, since an experiment file is checked without a client.
        from raytvb.storage.filesystems import set_anonymous
        from raytvb.storage.local_files import enter_folder
        from raytvb.storage.retries import set_patience

        enter_folder()
        set_patience(self.storage_timeout_s)
        set_anonymous(self.anonymous)

    @model_validator(mode="after")
    def _whole_above_one(self) -> ResourceConfig:
        for name, value in (("cpus", self.cpus_per_task), ("gpus", self.gpus_per_task)):
            if value > 1 and value != int(value):
                raise ValueError(
                    f"{name}_per_task = {value}: Ray takes fractions below 1 and whole "
                    f"numbers above"
                )
        return self
