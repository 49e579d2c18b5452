"""The metrics in the record of each kind of stored thing.

A record keeps its metrics as JSON. The code that commits a thing builds an object of the class for
its kind; readers get the object back with, for example, `record.metrics_as(BasisMetrics, where)`.
"""

from __future__ import annotations

import math

from pydantic import Field

from raytvb.storage.addresses import Key
from raytvb.storage.contract import Contract, JsonObject
from raytvb.storage.records import FileInfo
from raytvb.storage.shapes import Size


class BaseMetrics(Contract):
    """Metrics of the pretrained model."""

    parameters: int
    """Number of parameters of the image tower: D."""


class MaskMetrics(Contract):
    """Metrics of a mask. The function that commits a mask also returns them."""

    kept: int
    """Number of trainable entries."""
    total: int
    """Number of all entries: D."""


class OverlapMetrics(Contract):
    """How far the tasks' own masks overlap: Jaccard indices, over all pairs of masks."""

    mean: float
    min: float
    max: float


class VectorMetrics(Contract):
    """Metrics of a task vector and of the fine-tune that made it."""

    steps: int
    final_loss: float
    seconds: float
    images: int
    skipped: int
    """Training images that could not be read."""
    classes_without_images: int
    norm: float
    """Euclidean norm of the task vector."""


class CheckpointMetrics(Contract):
    """Metrics of a fine-tune that has not ended."""

    step: Size
    """Number of steps done."""
    loss: float
    """Loss of the last of those steps."""
    seconds: float
    """Time of those steps, summed over all attempts."""


class TwinMetrics(Contract):
    """Metrics of the prepared twin of a task vector."""

    norm: float
    """Euclidean norm."""
    nonzero: int
    """Number of stored values that are not zero."""


class OnlineMetrics(Contract):
    """State of an online basis while it takes in the tasks."""

    tasks: tuple[str, ...]
    """The tasks taken in so far, in the order in which they were taken in."""
    folder: Key | None
    """Folder of the M basis vectors; null before the first task."""
    written: dict[str, FileInfo]
    """The files in that folder."""

    def to_json(self) -> JsonObject:
        """The fields for a record, with the files in the form of every record."""
        written: JsonObject = {name: info.to_json() for name, info in self.written.items()}
        return {**super().to_json(), "written": written}


class BasisMetrics(Contract):
    """Metrics of a basis."""

    tasks: tuple[str, ...]
    """The tasks that the basis was made of, in the order of the columns of W."""
    vectors: int
    """M, the number of stored vectors."""
    convex: bool
    """Whether every basis vector is a convex combination of task vectors."""
    relative_error: float
    """Share of the squared norm of all task vectors that the reconstructions lose."""
    floor: float
    """The least relative error that any M vectors can have."""
    condition: float | None
    """Condition number of the normalised basis; null if it is infinite or not computed."""
    error_bounds: dict[str, float] | None = None
    """Of an online basis only: upper bounds of the tasks' relative errors (a norm, not squared)."""

    def to_json(self) -> JsonObject:
        """The fields for a record. Only an online basis has bounds, and JSON has no infinity."""
        fields = super().to_json()
        if self.error_bounds is None:
            del fields["error_bounds"]
        if self.condition is not None and not math.isfinite(self.condition):
            fields["condition"] = None
        return fields


class PrecisionMetrics(Contract):
    """The number format of evaluations, and how well bf16 agreed with fp32 if that was measured."""

    use: str = Field(pattern="^(fp32|bf16)$")
    device: str = "cpu"
    agreement: float | None = None
    """Share of equal answers, for the worse of two models; null if bf16 was not tried."""
    worst_task: float | None = None
    """Share of equal answers on the task where this share is lowest."""
    images: int | None = None
