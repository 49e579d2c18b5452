"""The metrics in the record of each kind of stored thing.

A record keeps its metrics as JSON. The code that commits a thing builds an object of the class for
its kind; readers get the object back with, for example, `record.metrics_as(BasisMetrics, where)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import Field

from raytvb.experiment.layout import MASK
from raytvb.storage.addresses import Key
from raytvb.storage.contract import Contract, JsonObject
from raytvb.storage.records import FileInfo
from raytvb.storage.shapes import Size


class StoreMetrics(Contract):
    """Metrics in the store's own record, beside the experiment that ran last."""

    name: str | None = None
    """Name of the experiment; null in stores of earlier formats."""
    vectors: str | None = None
    """The other store that the experiment takes vectors from; null if there is none."""
    dated: bool = False
    """Whether results without parents no longer count. Records of earlier formats do not say which
    vectors a result was measured on. These count while nothing has changed since."""

    def to_json(self) -> JsonObject:
        """The fields for a record, without `vectors` if it is None."""
        fields = super().to_json()
        if self.vectors is None:
            del fields["vectors"]
        return fields


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
    file: str = MASK
    """Name of the mask's file in its folder. A task's own mask may be made again; the file of the
    one before stays as long as the task's vector needs it."""


class OverlapMetrics(Contract):
    """How far the tasks' own masks overlap: Jaccard indices, over all pairs of masks."""

    mean: float
    min: float
    max: float


class Made(Contract):
    """That a thing was made, once or again."""

    time: str
    """When it was finished: UTC, as in 2026-01-31T12:00:00Z."""
    reason: str
    """Why: `new`, or in what it differs from the one before."""


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
    mask_overlap: float | None = None
    """Share of the entries of lowest sensitivity for this task that the shared mask keeps; null if
    the task is one of those that the mask was scored on, or has a mask of its own."""
    history: tuple[Made, ...] = ()
    """When and why this vector was made, and those before it, from the first one on."""

    def to_json(self) -> JsonObject:
        """The fields for a record, without `mask_overlap` if it is None."""
        fields = super().to_json()
        if self.mask_overlap is None:
            del fields["mask_overlap"]
        return fields


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


class ErrorBounds(Contract):
    """Upper bounds of the relative errors of the tasks that an online basis has taken in.

    A relative error is a norm, not squared.
    """

    tasks: int
    """Number of tasks taken in."""
    mean: float
    largest: float


class WholeBatches(Contract):
    """An online basis after the tasks that arrived in whole batches."""

    tasks: Size
    """Number of these tasks."""
    folder: Key | None
    """Folder of the M basis vectors; null if there are no such tasks."""
    written: dict[str, FileInfo]
    """The files in that folder."""

    def to_json(self) -> JsonObject:
        """The fields for a record, with the files in the form of every record."""
        return {**super().to_json(), "written": _infos(self.written)}


class OnlineMetrics(Contract):
    """State of an online basis while it takes in the tasks."""

    tasks: tuple[str, ...]
    """The tasks taken in so far, in the order in which they were taken in."""
    folder: Key | None
    """Folder of the M basis vectors; null before the first task."""
    written: dict[str, FileInfo]
    """The files in that folder."""
    bounds: tuple[ErrorBounds, ...] = ()
    """The bounds of the tasks' errors after each arrival, in their order."""
    whole: WholeBatches | None = None
    """The state before the last tasks, if these were fewer than `basis.buffer`; otherwise null.
    They are taken in again, together with those that come next."""

    def to_json(self) -> JsonObject:
        """The fields for a record, with the files in the form of every record."""
        fields = {**super().to_json(), "written": _infos(self.written)}
        if self.whole is None:
            return fields
        return {**fields, "whole": self.whole.to_json()}


def _infos(files: Mapping[str, FileInfo]) -> JsonObject:
    return {name: info.to_json() for name, info in files.items()}


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
