"""Model, masks and fine-tuning in an experiment file, and what a Ray task asks for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raytvb.experiment.base import TINY_MODEL, Count, Fraction, Frozen, Positive


class ModelConfig(Frozen):
    """The pretrained open_clip model whose image tower is fine-tuned."""

    name: str = Field(
        TINY_MODEL,
        description=f"open_clip name, hf-hub:…, local-dir:…, or the embedded {TINY_MODEL}",
    )
    pretrained: str | None = Field(
        None, description="open_clip tag or a checkpoint file; only with an open_clip name"
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.pretrained is not None and (
            self.name == TINY_MODEL or self.name.startswith(("hf-hub:", "local-dir:"))
        ):
            raise ValueError(f"pretrained: {self.name} brings its own weights; leave this out")
        return self


class TalosConfig(Frozen):
    """Which parameters are trained (TaLoS). density 1.0 trains all of them and writes dense
    vectors.
    """

    density: Fraction = 0.1
    mask: Literal["shared", "per-task"] = "shared"
    select: Literal["lowest", "highest", "magnitude", "random"] = Field(
        "lowest",
        description=(
            "entries to train: those of lowest sensitivity (TaLoS); to compare with: of highest, largest weights, random"
        ),
    )
    rounds: Count = Field(4, description="selection in stages, where it goes by sensitivity")
    damping: float = Field(0.1, ge=0.0, le=1.0)
    images: Count = Field(256, description="training images that are scored, per task")
    draws: Count | Literal["exact"] = 1
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the forward and backward pass of the scores"
    )

    @property
    def stages(self) -> int:
        """Rounds that are made: weights and random numbers do not change when weights are
        damped.
        """
        return self.rounds if self.select in ("lowest", "highest") else 1


class FinetuneConfig(Frozen):
    """Fine-tuning with AdamW, warm-up and cosine, clipping at norm 1, the zero-shot head frozen."""

    epochs: Positive = Field(10, description="for tasks that do not give their own")
    batch_size: Count = Field(128, description="images a step")
    accumulate: Count = Field(
        1, description="parts a batch is computed in, for less memory; its gradient is the same"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description=(
            "bf16: forward and backward pass in bfloat16 where that is safe (autocast); weights and AdamW stay float32"
        ),
    )
    lr: Positive | None = Field(
        None, description="default: 1e-5; tuned values on the embedded model"
    )
    weight_decay: float = Field(0.1, ge=0.0)
    warmup: float = Field(
        0.1, ge=0.0, description="share of the steps that warm up; from 1 on, a number of steps"
    )
    clip: Positive = 1.0
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)

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
    """Execution: what a Ray task asks for. None of it changes a result."""

    cpus_per_task: float = Field(1.0, ge=0.0)
    gpus_per_task: float = Field(0.0, ge=0.0)
    max_retries: int = Field(20, ge=0, description="restarts of a task whose worker or node died")
    checkpoint_s: float = Field(
        300.0, gt=0.0, description="seconds between checkpoints of a fine-tune"
    )
    concurrent_trials: int = Field(0, ge=0, description="0: as many as the cluster has room for")
    shards: Count = Field(
        1, description="actors that the coordinates of the vectors are split over for the basis"
    )
    cache: Literal["auto", "memory", "disk"] = Field(
        "auto",
        description=(
            "where those keep the vectors' kept values; auto: memory up to 1 GB each, else a file under $TMPDIR"
        ),
    )
    wait_s: float = Field(
        0.0, ge=0.0, description="how long to wait for an autoscaler to bring what is asked for"
    )

    @model_validator(mode="after")
    def _whole_above_one(self) -> ResourceConfig:
        for name in ("cpus_per_task", "gpus_per_task"):
            value = getattr(self, name)
            if value > 1 and value != int(value):
                raise ValueError(
                    f"{name} = {value}: Ray takes fractions below 1 and whole numbers above"
                )
        return self
