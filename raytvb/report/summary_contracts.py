"""The types of the results of an experiment, which `report/summary.json` holds and the page shows.

Accuracies and intervals are shares, 0 to 1, on the test split unless a field says otherwise. Every
choice behind them (coefficients, the chosen basis) was made on validation data. Intervals are
Wilson intervals of 95 %, (low, high).
"""

from __future__ import annotations

from typing import Any, TypeAlias

from pydantic import SerializerFunctionWrapHandler, field_serializer, model_serializer

from raytvb.experiment.layout import REPORT, SUMMARY
from raytvb.experiment.metrics import OverlapMetrics, PrecisionMetrics
from raytvb.search.results import Choice
from raytvb.storage import records
from raytvb.storage.checked_file import CheckedFile
from raytvb.storage.contract import Contract, JsonObject, parse_json
from raytvb.storage.damage import differs
from raytvb.storage.store import Store

Interval: TypeAlias = tuple[float, float]


class Accuracies(Contract):
    """Accuracies of one model on several tasks."""

    mean: float
    """Mean of the tasks' accuracies."""
    per_task: dict[str, float]
    normalised: dict[str, float | None]
    """Accuracy divided by that of the task's fine-tuned model; null if the latter is 0."""
    normalised_mean: float | None
    """Mean over the tasks that have a normalised accuracy; null if none has."""
    counts: dict[str, tuple[int, int]]
    """(correct answers, images) by task."""
    interval: dict[str, Interval]


class WeightedAccuracies(Accuracies):
    """Accuracies of adding all tasks, with one coefficient for each task or stored vector."""

    kind: str
    """`per-task` or `per-basis`."""
    weights: tuple[float, ...]
    validation_accuracy: float
    """Mean over the tasks, on validation images."""


class Spread(Contract):
    """How far single tasks are from their accuracy with full vectors, which a mean hides."""

    mean_absolute_difference: float
    worst_task: str
    worst_difference: float
    """Accuracy of the worst task minus its accuracy with the full vectors."""


class AdditionEntry(Accuracies):
    """One candidate. The accuracies are of the model to which all tasks are added."""

    merge: str
    """`decoded`: the tasks' vectors are added. `sum`: the plain sum of the basis vectors. Otherwise
    the merge method that makes one vector of the tasks' vectors."""
    method: str
    """Basis method, or `full` or `random-subset`."""
    size: int
    """M, the number of stored vectors; 0 for the full vectors."""
    online: bool
    relative_error: float
    """Share of the squared norm of all task vectors that the stored vectors do not reconstruct."""
    stored_bytes: int
    validation_objective: float | None
    """What the search maximises; null if it could not be measured."""
    validation_share: float | None
    """Share of the validation images that the coefficients were chosen on."""
    stopped: bool
    """Whether the search of this candidate ended early."""
    coefficient: dict[int, float]
    """The chosen coefficient, by number of tasks added."""
    own_lengths: dict[int, bool]
    """Whether decoded vectors get the lengths of the task vectors, by number of tasks added."""
    subsets: dict[int, float]
    """Mean accuracy of all additions, by number of tasks added."""
    spread: Spread
    weighted: WeightedAccuracies | None = None

    @model_serializer(mode="wrap")
    def _without_null(self, fields: SerializerFunctionWrapHandler) -> Any:
        """Leave `weighted` out if there is none."""
        values = fields(self)
        if self.weighted is None:
            del values["weighted"]
        return values


class NamedAdditionModel(Accuracies):
    """The result of a named addition, from one kind of vectors."""

    coefficient: float


class NamedAddition(Contract):
    """An addition that the experiment names."""

    tasks: tuple[str, ...]
    models: dict[str, NamedAdditionModel]
    """By the kind of vectors that are added: `full`, and the chosen basis."""


class Negation(Contract):
    """Accuracies before and after one task was subtracted: of that task, and of the control."""

    before: float
    after: float
    interval: Interval
    """Interval of `after`."""
    control_before: float
    control_after: float
    coefficient: float
    """0 if subtracting the task would not lower its accuracy on validation data."""
    control_validation_before: float
    control_validation_after: float


class UnseenModel(Contract):
    """Accuracy on an unseen task, and the number of coefficients learned for it."""

    accuracy: float
    interval: Interval
    coefficients: int


class UnseenEntry(Contract):
    """Results on a task without a vector, for which coefficients of other vectors are learned."""

    images: int
    """Training images that the coefficients were learned on."""
    zero_shot: UnseenModel
    basis: UnseenModel
    full: UnseenModel


class PairErrors(Contract):
    """Disentanglement errors of one pair of tasks, 0 (no interference) to 2."""

    error: tuple[tuple[float, ...], ...]
    """Rows are coefficients of the first task, columns those of the second."""
    mean: float


class Disentanglement(Contract):
    """The errors of a pair of tasks over a grid of their coefficients."""

    tasks: tuple[str, str]
    coefficients: tuple[float, ...]
    """The coefficients on each axis of the grid."""
    models: dict[str, PairErrors]
    """By the kind of vectors that are added: `full`, and the chosen basis."""


class ArrivalAccuracies(Contract):
    """Accuracies after each arrival, from one kind of vectors."""

    accuracy: tuple[tuple[float | None, ...], ...]
    """Arrivals by tasks, each task decoded by itself; null if the task had not arrived."""
    mean: tuple[float, ...]
    """Mean of each row of `accuracy`."""
    added: tuple[float, ...]
    """Mean accuracy of the model to which all tasks so far are added, after each arrival."""
    forgetting: dict[str, float]
    """By task: its best accuracy before the last arrival, minus its accuracy after that."""


class Online(Contract):
    """Results of a basis that took in the task vectors one by one, and of two references."""

    method: str
    size: int
    arrivals: tuple[int, ...]
    """Numbers of tasks after which it was measured."""
    tasks: tuple[str, ...]
    """The columns of `accuracy`: all tasks, or 16 of them if there are more."""
    online: ArrivalAccuracies
    offline: ArrivalAccuracies
    """A basis of the same method and size, fitted to all vectors so far."""
    full: ArrivalAccuracies
    """The task vectors themselves."""


class ChosenBasis(Contract):
    """The basis that the search chose."""

    name: str
    method: str
    size: int
    merge: str
    coefficient: dict[int, float]
    own_lengths: dict[int, bool]
    objective: float
    """The objective of the search, on validation data."""
    tolerance: float | None
    stored_bytes: int


class NothingChosen(Contract):
    """The search chose no basis."""

    name: None = None
    reason: str


class StoredBytes(Contract):
    """Sizes of the files in the store, in bytes."""

    dense_fp32: int
    """What dense float32 vectors of all tasks would take."""
    vectors: int
    masks: int
    heads: int
    basis: int
    """All bases together."""


class Provenance(Contract):
    """What the results depend on."""

    experiment: JsonObject
    """The identity of the experiment: what it computes."""
    base: str
    """Fingerprint of the pretrained model."""
    selection: str
    """The data that every choice was made on, in words."""
    test: str
    """When the test split was read, in words."""
    precision: PrecisionMetrics
    versions: dict[str, str]

    @field_serializer("precision")
    def _as_measured(self, precision: PrecisionMetrics) -> Any:
        """Leave out figures that were not measured."""
        return precision.model_dump(mode="json", exclude_unset=True)


class MissingTask(Contract):
    """A task of the experiment that the results were built without."""

    name: str
    stage: str
    """Where it failed; '' if no run has tried it."""
    reason: str
    attempts: int


class Summary(Contract):
    """All results of an experiment."""

    tasks: tuple[str, ...]
    """The tasks with a vector that the results were built from."""
    missing: tuple[MissingTask, ...] = ()
    """What failed, also control and unseen tasks. The file has no such field if it is empty."""
    zero_shot: dict[str, float]
    """Accuracy of the pretrained model, by task."""
    fine_tuned: dict[str, float]
    """Accuracy of each task's own fine-tuned model."""
    addition: dict[str, AdditionEntry]
    """By candidate: `full` and the bases that were tested."""
    random_subset: dict[str, AdditionEntry]
    """By candidate: baselines that use a random subset of the tasks instead of a basis."""
    additions: tuple[NamedAddition, ...]
    negation: dict[str, Negation]
    """By task, from the full vectors."""
    negation_basis: dict[str, Negation]
    """By task, from the chosen basis."""
    unseen: dict[str, UnseenEntry]
    """By task."""
    disentanglement: tuple[Disentanglement, ...]
    online: dict[str, Online]
    """By the name of the online basis."""
    mask_overlap: OverlapMetrics | None
    chosen: ChosenBasis | NothingChosen
    search: Choice
    stored_bytes: StoredBytes
    seconds: dict[str, float]
    """Seconds of each stage, summed over all runs."""
    floor: dict[str, float]
    """By basis: the least relative error of any basis of its size."""
    provenance: Provenance

    @model_serializer(mode="wrap")
    def _without_empty(self, fields: SerializerFunctionWrapHandler) -> Any:
        """Leave `missing` out if nothing is missing."""
        values = fields(self)
        if not self.missing:
            del values["missing"]
        return values

    @field_serializer("search")
    def _as_recorded(self, search: Choice) -> Any:
        """The choice as the record of the search has it."""
        return search.to_json()


def read_summary(store: Store) -> Summary:
    """The summary that the stage `report` wrote.

    Raises StoreKeyError if there is none, and DamagedError if it differs from its record.
    """
    key = records.file_key(REPORT, SUMMARY)
    file = CheckedFile.find(store, key)
    if file.info is None and store.exists(key) and not records.is_first_format(store):
        raise differs(store.where(key), store.url, "its record is missing")
    data = file.read()
    return Summary.from_json(parse_json(data, store.where(key)), store.where(key))
