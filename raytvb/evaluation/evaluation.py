"""What all evaluations have in common.

An evaluation is a frozen value that says what is measured, and with which choices. Its `run`
measures, and finally writes rows to the store. The caller of `run` passes a `Context`, so the
evaluation itself is small and can be sent to a worker. To add an evaluation, subclass `Evaluation`
in a file of its own and list it in `plan`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from raytvb.evaluation.rows import stored_rows
from raytvb.experiment.config import Experiment
from raytvb.experiment.present_versions import Parents, PresentVersions
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
    present: PresentVersions
    """The versions that are measured."""

    @property
    def store(self) -> Store:
        """The experiment's store."""
        return Store(self.experiment.store)


@dataclass(frozen=True)
class Evaluation(ABC):
    """One evaluation, which writes one file of rows."""

    precision: str
    """Number format of the forward passes: fp32 or bf16."""

    splits: ClassVar[tuple[str, ...]] = ("test",)
    """The splits whose evaluators `run` uses."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the evaluation in the store (see `store_names`)."""

    @property
    def choices(self) -> JsonObject:
        """What the rows depend on, beside the precision and what is measured."""
        return {}

    @property
    def identity(self) -> JsonObject:
        """Identity that is stored with the rows. If it changes, the evaluation is made again."""
        return {**self.choices, "precision": self.precision}

    @abstractmethod
    def parents(self, present: PresentVersions) -> Parents:
        """The versions of vectors, bases and images that the rows depend on.

        If they change, the evaluation is made again. Raises UserError if a basis is not there.
        """

    def is_done(self, store: Store, present: PresentVersions) -> bool:
        """Whether the store has the rows, measured on the present versions."""
        stored = stored_rows(store, self.name)
        if stored is None:
            return False
        identity = dict(stored.identity)
        # In earlier formats, a part of the tasks is listed in the identity.
        tasks = identity.pop("tasks", [*present.vectors])
        if identity != self.identity or tasks != [*present.vectors]:
            return False
        if stored.record is None:
            return not present.dated
        return present.counts(stored.record, self.parents(present))

    @abstractmethod
    def run(self, context: Context) -> None:
        """Measure, and write the rows."""


def chosen_settings(outcome: MeasuredOutcome) -> JsonObject:
    """The settings of an outcome as part of an identity. Keys are strings, as in the store."""
    fields = outcome.to_json()
    return {"coefficient": fields["coefficient"], "own_lengths": fields["own_lengths"]}
