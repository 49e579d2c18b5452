"""What the search measures and decides, as values.

From small to large: a `Setting` is tried, which gives `Tried`; a round of a candidate is `Measured`
or `Invalid`; all rounds of a candidate end in its `Outcome`, and all outcomes in one `Choice`.
Rounds, outcomes and the choice are the metrics of records in the store. Numbers of tasks are keys
of JSON objects there, and so are strings; here they are int.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from pydantic import Field

from raytvb.storage.contract import Contract, JsonObject


@dataclass(frozen=True, order=True)
class Setting:
    """How a number of tasks is added: what a line search or a grid tries."""

    coefficient: float
    """alpha: the merged model is theta_0 + alpha * (sum of the tasks' vectors)."""
    own_lengths: bool = False
    """Decoded vectors are given the lengths of the task vectors."""


class Tried(Contract):
    """One setting of one number of tasks, measured on a share of the validation images."""

    size: int
    """Number of tasks added."""
    coefficient: float
    own_lengths: bool
    accuracy: float
    """Mean over all tasks of all subsets of this size."""
    expected: float
    """As `accuracy`, of the expected share of correct answers (see `Count`)."""
    correct: int
    total: int

    @property
    def setting(self) -> Setting:
        """What was tried."""
        return Setting(self.coefficient, self.own_lengths)


class TunedWeights(Contract):
    """Coefficients of the addition of all tasks, one for each task or each basis vector."""

    kind: Literal["per-task", "per-basis"]
    weights: tuple[float, ...]
    accuracy: float
    """Mean accuracy on the validation images."""
    trials: int
    """Weights that were measured to find these."""
    images: int
    """Forward passes that this took."""

    @property
    def per_basis(self) -> bool:
        """One coefficient for each stored vector, instead of one for each task."""
        return self.kind == "per-basis"


class Measured(Contract):
    """A round of a candidate: the best setting of each number of tasks, on a share of the images.

    Keys of the dictionaries are numbers of tasks added.
    """

    objective: float
    share: float
    coefficient: dict[int, float]
    own_lengths: dict[int, bool]
    accuracy: dict[int, float]
    tried: tuple[Tried, ...]
    images: int
    """Forward passes of this round, in images. Those of earlier rounds are not counted again.

    The images of a task pass once for each setting and each subset that the task is in. They pass
    only once if nothing is added, which is the same model for all subsets. (Stores of earlier
    versions count them for each subset there, too.)"""
    evaluations: int
    """Settings measured in this round."""
    vector: TunedWeights | None = None
    """Tuned in the last round, if the experiment asks for it."""

    def setting(self, size: int) -> Setting:
        """The best setting for additions of `size` tasks."""
        return Setting(self.coefficient[size], self.own_lengths[size])

    def tried_of(self, size: int) -> list[Tried]:
        """The rows of additions of `size` tasks."""
        return [row for row in self.tried if row.size == size]

    def to_json(self) -> JsonObject:
        """For a record: `vector` is left out if there is none."""
        return _without_null(super().to_json(), "vector")


class Invalid(Contract):
    """A round of a candidate that cannot be measured: its vectors are not finite, for instance."""

    invalid: str
    """The reason."""

    def to_json(self) -> JsonObject:
        """For a record, with the empty fields that a measured round has."""
        return {**super().to_json(), "objective": None, "accuracy": {}}


RoundResult: TypeAlias = Measured | Invalid


def parse_round(metrics: JsonObject, where: str) -> RoundResult:
    """A round from a record's metrics; `where` names the record. Raises StoreError if they are
    neither kind of round.
    """
    if "invalid" in metrics:
        return Invalid.from_json(metrics, where)
    return Measured.from_json(metrics, where)


class Outcome(Contract):
    """A candidate after its last round: that round's result, and what all rounds took."""

    invalid: str | None = None
    """Why it could not be measured; `coefficient` and the like are empty then. Null if it was."""
    stopped: bool = False
    """It ended before the last round because others of its size were better."""
    objective: float | None = None
    """Of the last round; null where that was invalid."""
    objectives: tuple[float | None, ...] = ()
    """Of every round."""
    share: float | None = None
    """Share of the validation images of the last round."""
    coefficient: dict[int, float] = Field(default_factory=dict)
    own_lengths: dict[int, bool] = Field(default_factory=dict)
    accuracy: dict[int, float] = Field(default_factory=dict)
    vector: TunedWeights | None = None
    evaluations: int = 0
    images: int = 0
    chosen: bool = False
    front: bool = False
    """It is on the Pareto front of accuracy and bytes."""
    stored_bytes: int = 0

    def setting(self, size: int) -> Setting:
        """What validation chose for additions of `size` tasks."""
        return Setting(self.coefficient[size], self.own_lengths[size])


class Choice(Contract):
    """What a search chose, and how much it measured."""

    name: str | None
    """The chosen basis; null where no basis is better than the pretrained model."""
    reason: str | None = None
    """Why there is none."""
    best: str | None
    """The most accurate basis, whatever its bytes."""
    objective_of: str
    tolerance: float | None = None
    zero_shot: float
    """Objective of the pretrained model."""
    front: tuple[str, ...]
    """Candidates that no other one beats in both accuracy and bytes."""
    stopped: tuple[str, ...]
    invalid: dict[str, str]
    """Reasons, by candidate."""
    candidates: int
    evaluations: int
    images: int
    selection: str
    """Which images the choice was made on."""
    test: str
    """When the test split was read."""

    def to_json(self) -> JsonObject:
        """For a record: `reason` is left out if a basis was chosen."""
        return _without_null(super().to_json(), "reason")


def _without_null(fields: JsonObject, name: str) -> JsonObject:
    if fields[name] is None:
        del fields[name]
    return fields
