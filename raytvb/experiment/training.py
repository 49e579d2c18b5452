"""Model, masks, fine-tuning and resources, in an experiment file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raytvb.experiment.base import TINY_MODEL, Count, Fraction, Frozen, Positive


class ModelConfig(Frozen):
    """The pretrained open_clip model whose image tower is fine-tuned."""

    name: str = Field(
        TINY_MODEL,
        description=(
            f"Name of an open_clip model, hf-hub:OWNER/NAME, local-dir:PATH, or {TINY_MODEL}, the "
            f"embedded one."
        ),
    )
    pretrained: str | None = Field(
        None,
        description=(
            "Weights: a tag of open_clip or a checkpoint file. Only with the name of an open_clip "
            "model; the others bring their own."
        ),
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        has_weights = self.name == TINY_MODEL or self.name.startswith(("hf-hub:", "local-dir:"))
        if self.pretrained is not None and has_weights:
            raise ValueError(f"pretrained: {self.name} brings its own weights; leave this out")
        return self


class TalosConfig(Frozen):
    """Which parameters are trained (TaLoS): those to which a task's answers are least sensitive."""

    density: Fraction = Field(
        0.1,
        description=(
            "Share of the parameters that is trained. 1.0 trains all of them, without a mask, and "
            "writes dense vectors."
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
            "Which entries are trained. lowest: those of lowest sensitivity (TaLoS). To compare "
            "with: highest (sensitivity), magnitude (largest weights), random."
        ),
    )
    rounds: Count = Field(
        4,
        description=(
            "Rounds in which the mask is thinned down to the density; each scores anew. Only where "
            "entries are selected by sensitivity."
        ),
    )
    damping: float = Field(
        0.1,
        ge=0.0,
        le=1.0,
        description=(
            "Factor on the weights that are rejected already, while later rounds score. 1.0 leaves "
            "them as they are."
        ),
    )
    images: Count = Field(256, description="Training images that are scored, for each task.")
    draws: Count | Literal["exact"] = Field(
        1,
        description=(
            "How many labels are drawn from the model's answer to each image. exact: the "
            "expectation over all classes."
        ),
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Of the forward and backward pass of the scores."
    )

    @property
    def stages(self) -> int:
        """Rounds that are made: one where sensitivity does not count, as damping would change
        nothing.
        """
        return self.rounds if self.select in ("lowest", "highest") else 1


class FinetuneConfig(Frozen):
    """Fine-tuning with AdamW, warm-up and cosine; the zero-shot head is frozen."""

    epochs: Positive = Field(10, description="For tasks that do not give their own.")
    batch_size: Count = Field(128, description="Images a step.")
    accumulate: Count = Field(
        1,
        description=(
            "Parts that a batch is computed in, to need less memory. The gradient is the same."
        ),
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description=(
            "bf16: forward and backward pass in bfloat16 where that is safe (autocast). Weights "
            "and AdamW stay float32."
        ),
    )
    lr: Positive | None = Field(
        None,
        description="Learning rate. Default: 1e-5; on the embedded model a value tuned for it.",
    )
    weight_decay: float = Field(
        0.1, ge=0.0, description="Decoupled weight decay, on the trained entries only."
    )
    warmup: float = Field(
        0.1,
        ge=0.0,
        description="Steps of warm-up: below 1 a share of all steps, from 1 on a number.",
    )
    clip: Positive = Field(1.0, description="Norm that gradients are clipped to.")
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="Of the cross entropy.")

    @model_validator(mode="after")
    def _whole_parts(self) -> FinetuneConfig:
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate = {self.accumulate}: at most {self.batch_size}, the batch_size"
            )
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup = {self.warmup}: a share below 1, or a whole number of steps")
        return self


class ResourceConfig(Frozen):
    """What Ray gives to each task. None of it changes a result."""

    cpus_per_task: float = Field(1.0, ge=0.0, description="CPUs of a Ray task.")
    gpus_per_task: float = Field(
        0.0, ge=0.0, description="GPUs of a Ray task. 0.25: four tasks share one."
    )
    max_retries: int = Field(
        20, ge=0, description="How often a task is restarted whose worker or node died."
    )
    checkpoint_s: float = Field(
        300.0, gt=0.0, description="Seconds between the checkpoints of a fine-tune."
    )
    concurrent_trials: int = Field(
        0,
        ge=0,
        description="Trials of the search at a time. 0: as many as the cluster has room for.",
    )
    shards: Count = Field(
        1,
        description=(
            "Actors that build a basis side by side; each has a part of the vectors' coordinates."
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
        description="Seconds to wait for an autoscaler to bring the resources.",
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
