"""What the record of each kind of stored thing measures.

A record keeps its metrics as JSON. Whoever commits a thing builds the class of its kind here;
readers get it back with `record.metrics_as(BasisMetrics, where)`.
"""

from __future__ import annotations

import math

from pydantic import Field

from raytvb.storage.contract import Contract, JsonObject
from raytvb.storage.records import FileInfo


class BaseMetrics(Contract):
    """Of the pretrained model."""

    parameters: int
    """Of the image tower: D."""


class MaskMetrics(Contract):
    """Of a mask; it is also what its commit returns."""

    kept: int
    """Trainable entries."""
    total: int
    """All entries: D."""


class OverlapMetrics(Contract):
    """How far the tasks' own masks overlap: shares of the entries of one that another has too."""

    mean: float
    min: float
    max: float


class VectorMetrics(Contract):
    """Of a task vector and the fine-tune that made it."""

    steps: int
    final_loss: float
    seconds: float
    images: int
    skipped: int = 0
    """Training images that could not be read."""
    classes_without_images: int = 0
    norm: float
    """Euclidean norm of the task vector."""


class CheckpointMetrics(Contract):
    """Of a fine-tune that has not ended."""

    step: int
    """Steps done."""
    loss: float
    """Of the last of those steps."""
    seconds: float
    """Time spent on them, in all attempts together."""


class TwinMetrics(Contract):
    """Of the prepared twin of a task vector."""

    norm: float
    """Euclidean norm."""
    nonzero: int
    """Stored values that are not zero."""


class OnlineMetrics(Contract):
    """Of an online basis while it follows the tasks."""

    tasks: tuple[str, ...] = ()
    """The tasks taken in so far, in that order."""
    folder: str | None = None
    """Folder of the M basis vectors; null before the first task."""
    written: dict[str, FileInfo] = Field(default_factory=dict)
    """The files in that folder."""

    def to_json(self) -> JsonObject:
        """For the record, files as every record lists them."""
        written: JsonObject = {name: info.to_json() for name, info in self.written.items()}
        return {**super().to_json(), "written": written}


class BasisMetrics(Contract):
    """Of a basis."""

    tasks: tuple[str, ...]
    """The tasks it was made of, in the order of the columns of W."""
    vectors: int
    """M, the number of stored vectors."""
    convex: bool
    """Every basis vector is a convex combination of task vectors."""
    relative_error: float
    """Share of the squared norm of all task vectors that reconstructions miss."""
    floor: float
    """Least relative error of any M vectors."""
    condition: float | None = None
    """Condition number of the normalised basis; null where it is infinite or not computed."""
    error_bounds: dict[str, float] | None = None
    """Of an online basis, by task: an upper bound of the relative error (a norm, not squared)."""

    def to_json(self) -> JsonObject:
        """For the record: only an online basis has bounds, and JSON has no infinity."""
        fields = super().to_json()
        if self.error_bounds is None:
            del fields["error_bounds"]
        if self.condition is not None and not math.isfinite(self.condition):
            fields["condition"] = None
        return fields


class PrecisionMetrics(Contract):
    """What evaluations compute in, and how well bf16 agreed with fp32 where that was measured."""

    use: str = Field("fp32", pattern="^(fp32|bf16)$")
    device: str = "cpu"
    agreement: float | None = None
    """Share of equal answers, of the worse of two models; null where bf16 was not tried."""
    worst_task: float | None = None
    """Share of equal answers on the task where it is lowest."""
    images: int | None = None
