"""What all evaluations have in common.

An evaluation is a frozen value: what it measures and with which choices. Its `run` measures and, as
its last act, writes rows to the store. Whoever runs it gives it a `Context`, so that an evaluation
itself is small and can be sent to a worker. To add one: subclass `Evaluation` in a file of its own,
and list it in `plan`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from raytvb.experiment.config import Experiment
from raytvb.models.evaluator import Evaluator
from raytvb.search.results import Outcome
from raytvb.storage.contract import JsonObject
from raytvb.storage.store import Store


@dataclass(frozen=True)
class Context:
    """What an evaluation is run with."""

    experiment: Experiment
    fingerprint: str
    """Of the pretrained model."""
    evaluator: Callable[[str], Evaluator]
    """The evaluator of a split, `val` or `test`."""

    @property
    def store(self) -> Store:
        """The experiment's store."""
        return Store(self.experiment.store)


@dataclass(frozen=True)
class Evaluation(ABC):
    """One evaluation, which gives one file of rows."""

    precision: str
    """Of the forward passes: fp32 or bf16."""

    splits: ClassVar[tuple[str, ...]] = ("test",)
    """Splits whose evaluators `run` asks for."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in the store, see `store_names`."""

    @property
    def choices(self) -> JsonObject:
        """What the rows depend on beside the frozen part of the experiment and the precision."""
        return {}

    @property
    def identity(self) -> JsonObject:
        """Stored with the rows: an evaluation with another identity is made again."""
        return {**self.choices, "precision": self.precision}

    @abstractmethod
    def run(self, context: Context) -> None:
        """Measure, and write the rows."""


def chosen_settings(outcome: Outcome) -> JsonObject:
    """The settings of an outcome as a part of an identity: keys are strings, as in the store."""
    fields = outcome.to_json()
    return {"coefficient": fields["coefficient"], "own_lengths": fields["own_lengths"]}
