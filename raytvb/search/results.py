"""The types of what the search measures and decides.

From small to large: to try a `Setting` gives a `Tried`. A round of a candidate is `Measured` or
`Invalid`. All rounds of a candidate give its `Outcome`, which is a `MeasuredOutcome` or an
`InvalidOutcome`. All outcomes give one `Choice`. Rounds, outcomes and the choice are stored as the
metrics of records. A field that every record has is required. Numbers of tasks are int here, and
strings in the store, because they are keys of JSON objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator

from raytvb.storage.contract import Contract, JsonObject


@dataclass(frozen=True, order=True)
class Setting:
    """How tasks are added: one point that a line search or a grid tries."""

    coefficient: float
    """alpha: the merged model is theta_0 + alpha * (sum of the tasks' vectors)."""
    own_lengths: bool = False
    """Whether decoded vectors are given the lengths of the task vectors."""


class Tried(Contract):
    """One setting of one number of tasks, measured on a share of the validation images."""

    size: int
    """Number of tasks added."""
    coefficient: float
    own_lengths: bool
    accuracy: float
    """Mean over all tasks of all subsets of this size."""
    expected: float
    """Like `accuracy`, but the mean of the expected shares of correct answers (see `Count`)."""
    correct: int
    total: int

    @property
    def setting(self) -> Setting:
        """The setting that was tried."""
        return Setting(self.coefficient, self.own_lengths)


class TunedWeights(Contract):
    """Coefficients of the addition of all tasks, one for each task or each basis vector."""

    kind: Literal["per-task", "per-basis"]
    weights: tuple[float, ...]
    accuracy: float
    """Mean accuracy on the validation images."""
    trials: int
    """How many weights the search for these has measured."""
    images: int
    """Forward passes that the search for these took, in images."""

    @property
    def per_basis(self) -> bool:
        """Whether there is one coefficient for each stored vector, not one for each task."""
        return self.kind == "per-basis"


class BestSettings(Contract):
    """The best setting of each number of tasks, on a share of the validation images.

    Keys of the dictionaries are numbers of tasks added. All three have the same keys.
    """

    objective: float
    share: float
    coefficient: dict[int, float] = Field(min_length=1)
    own_lengths: dict[int, bool]
    accuracy: dict[int, float]

    @field_validator("own_lengths", "accuracy")
    @classmethod
    def _same_sizes(cls, values: dict[int, Any], info: ValidationInfo) -> dict[int, Any]:
        coefficient = info.data.get("coefficient")
        if coefficient is not None and values.keys() != coefficient.keys():
            raise ValueError("it has other numbers of tasks than coefficient")
        return values

    def setting(self, size: int) -> Setting:
        """The best setting for additions of `size` tasks."""
        return Setting(self.coefficient[size], self.own_lengths[size])


class Measured(BestSettings):
    """A round of a candidate that has been measured."""

    tried: tuple[Tried, ...]
    images: int
    """Forward passes of this round, in images. Those of earlier rounds are not counted again.

    The images of a task pass once for each setting and each subset that the task is in. If nothing
    is added, the model is the same for all subsets, and the images pass only once. (Stores of
    earlier versions count them once for each subset in this case, too.)"""
    evaluations: int
    """Settings measured in this round."""
    vector: TunedWeights | None = None
    """The weights that the last round has tuned, if the experiment asks for it."""

    def tried_of(self, size: int) -> list[Tried]:
        """The rows of additions of `size` tasks."""
        return [row for row in self.tried if row.size == size]

    def to_json(self) -> JsonObject:
        """The fields for a record. `vector` is left out if it is None."""
        return _without_null(super().to_json(), "vector")


class Invalid(Contract):
    """A round of a candidate that cannot be measured: its vectors are not finite, for instance."""

    invalid: str
    """The reason."""

    def to_json(self) -> JsonObject:
        """The fields for a record, with empty ones for those that a measured round has."""
        return {**super().to_json(), "objective": None, "accuracy": {}}


RoundResult: TypeAlias = Measured | Invalid


def parse_round(metrics: JsonObject, where: str) -> RoundResult:
    """A round from the metrics of a record. where: names the record's file in errors.

    Raises StoreError if the metrics are neither kind of round.
    """
    if "invalid" in metrics:
        return Invalid.from_json(metrics, where)
    return Measured.from_json(metrics, where)


class MeasuredOutcome(BestSettings):
    """A candidate after its last round: the result of that round, and the cost of all rounds."""

    objectives: tuple[float, ...]
    """Objective of every round."""
    stopped: bool
    """Whether it ended before the last round, because others of its size were better."""
    vector: TunedWeights | None
    """The weights that the last round has tuned, if the experiment asks for it."""
    evaluations: int
    images: int
    chosen: bool
    front: bool
    """Whether it is on the Pareto front of accuracy and bytes."""
    stored_bytes: int

    def to_json(self) -> JsonObject:
        """The fields for a record, with an empty one for the reason of an invalid outcome."""
        return {**super().to_json(), "invalid": None}


class InvalidOutcome(Contract):
    """A candidate whose last round could not be measured."""

    invalid: str
    """The reason."""
    objectives: tuple[float | None, ...]
    """Objective of every round; null for the last one."""
    evaluations: int
    images: int
    stored_bytes: int

    def to_json(self) -> JsonObject:
        """The fields for a record, with empty ones for those that a measured outcome has."""
        empty: JsonObject = {
            "objective": None,
            "share": None,
            "coefficient": {},
            "own_lengths": {},
            "accuracy": {},
            "stopped": False,
            "vector": None,
            "chosen": False,
            "front": False,
        }
        return {**super().to_json(), **empty}


Outcome: TypeAlias = MeasuredOutcome | InvalidOutcome


def parse_outcome(metrics: JsonObject, where: str) -> Outcome:
    """An outcome from the metrics of a record. where: names the record's file in errors.

    Raises StoreError if the metrics are neither kind of outcome.
    """
    if metrics.get("invalid") is not None:
        return InvalidOutcome.from_json(metrics, where)
    return MeasuredOutcome.from_json(metrics, where)


class Choice(Contract):
    """What a search chose, and how much it measured."""

    name: str | None
    """The chosen basis; null if no basis is better than the pretrained model."""
    reason: str | None = None
    """Why no basis was chosen."""
    best: str | None
    """The most accurate basis, whatever its bytes."""
    objective_of: str
    tolerance: float | None
    zero_shot: float
    """Objective of the pretrained model."""
    front: tuple[str, ...]
    """Candidates that no other one beats in both accuracy and bytes."""
    stopped: tuple[str, ...]
    invalid: dict[str, str]
    """Why candidates could not be measured, by candidate."""
    candidates: int
    evaluations: int
    images: int
    selection: str
    """The images that the choice was made on, in words."""
    test: str
    """When the test split is read, in words."""

    def to_json(self) -> JsonObject:
        """The fields for a record. `reason` is left out if a basis was chosen."""
        return _without_null(super().to_json(), "reason")


def _without_null(fields: JsonObject, name: str) -> JsonObject:
    if fields[name] is None:
        del fields[name]
    return fields
