"""What all evaluations have in common.

An evaluation is a frozen value that says what is measured, and with which choices. Its `run`
measures, and finally writes rows to the store. The caller of `run` passes a `Context`, so the
evaluation itself is small and can be sent to a worker. To add an evaluation, subclass `Evaluation`
in a file of its own and list it in `plan`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from raytvb.experiment.config import Experiment
from raytvb.models.evaluator import Evaluator
from raytvb.search.results import MeasuredOutcome
from raytvb.storage.contract import JsonObject
from raytvb.storage.store import Store


@dataclass(frozen=True)
class Context:
    """What an evaluation needs to run."""

    experiment: Experiment
    fingerprint: str
    """Checksum of the pretrained model."""
    evaluator: Callable[[str], Evaluator]
    """The evaluator of a split, `val` or `test`."""

    @property
    def store(self) -> Store:
        """The experiment's store."""
        return Store(self.experiment.store)


@dataclass(frozen=True)
class Evaluation(ABC):
    """One evaluation, which writes one file of rows."""

    precision: str
    """Number format of the forward passes: fp32 or bf16."""

    tasks: tuple[str, ...] = field(default=(), kw_only=True)
    """The tasks that are there, if others of the experiment are missing; otherwise empty."""

    splits: ClassVar[tuple[str, ...]] = ("test",)
    """The splits whose evaluators `run` uses."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the evaluation in the store (see `store_names`)."""

    @property
    def choices(self) -> JsonObject:
        """What the rows depend on, beside the precision and the frozen part of the experiment."""
        return {}

    @property
    def identity(self) -> JsonObject:
        """Identity that is stored with the rows. If it changes, the evaluation is made again."""
        identity: JsonObject = {**self.choices, "precision": self.precision}
        return {**identity, "tasks": [*self.tasks]} if self.tasks else identity

    @abstractmethod
    def run(self, context: Context) -> None:
        """Measure, and write the rows."""


def chosen_settings(outcome: MeasuredOutcome) -> JsonObject:
    """The settings of an outcome as part of an identity. Keys are strings, as in the store."""
    fields = outcome.to_json()
    return {"coefficient": fields["coefficient"], "own_lengths": fields["own_lengths"]}
