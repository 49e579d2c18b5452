"""The section `finetune` of an experiment file."""

from __future__ import annotations

from pydantic import Field, model_validator

from raytvb.experiment.fields import (
    Count,
    Epochs,
    Frozen,
    Precision,
    Rate,
    Real,
    Smoothing,
    WeightDecay,
)


class FinetuneConfig(Frozen):
    """Fine-tuning with AdamW, a warm-up and a cosine schedule. The zero-shot head is frozen."""

    epochs: Epochs = Field(10, description="Epochs of tasks that do not give their own.")
    batch_size: Count = Field(128, description="Images in each step.")
    accumulate: Count = Field(
        1,
        description=(
            "In how many parts a batch is computed. More parts need less memory; the gradient is "
            "the same."
        ),
    )
    precision: Precision = Field(
        "fp32",
        description=(
            "Number format of training. bf16: forward and backward pass in bfloat16 where that is "
            "safe (autocast). Weights and AdamW stay in float32."
        ),
    )
    lr: Rate | None = Field(
        None,
        description="Learning rate. Default: 1e-5; for the embedded model, a value tuned for it.",
    )
    weight_decay: WeightDecay = Field(
        0.1, description="Decoupled weight decay, on the trained entries only."
    )
    warmup: Real = Field(
        0.1,
        ge=0.0,
        le=1e9,
        description="Warm-up: below 1 a share of all steps, from 1 on a number of steps.",
    )
    clip: Real = Field(1.0, gt=0.0, le=1e30, description="Norm that gradients are clipped to.")
    label_smoothing: Smoothing = Field(0.0, description="For the cross entropy.")

    @model_validator(mode="after")
    def _whole_parts(self) -> FinetuneConfig:
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate = {self.accumulate}: at most {self.batch_size}, the batch_size"
            )
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup = {self.warmup}: a share below 1, or a whole number of steps")
        return self
