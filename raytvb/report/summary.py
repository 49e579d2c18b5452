"""Builds the summary of an experiment from its store.

Accuracies are 0 to 1. Every choice behind them (coefficients, the chosen basis) was made on
validation data. The test split is read once for each candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from torch import Tensor

from raytvb.errors import FailedPart, UserError
from raytvb.evaluation.rows import read_rows
from raytvb.evaluation.store_names import SINGLE_MODELS
from raytvb.experiment.basis_specs import basis_specs
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import BASE, OVERLAP, PRECISION, basis_prefix
from raytvb.experiment.metrics import BaseMetrics, BasisMetrics, OverlapMetrics, PrecisionMetrics
from raytvb.experiment.missing import built_from, missing_parts, without
from raytvb.experiment.stored import load_gram, stored_bytes
from raytvb.report.accuracies import accuracies_of
from raytvb.report.addition_entries import Entries
from raytvb.report.arrivals import online_entry
from raytvb.report.finished_search import FinishedSearch, finished_search
from raytvb.report.operation_entries import (
    disentanglements,
    named_additions,
    negations,
    unseen_entries,
)
from raytvb.report.summary_contracts import (
    AdditionEntry,
    ChosenBasis,
    MissingTask,
    NothingChosen,
    Online,
    Provenance,
    StoredBytes,
    Summary,
)
from raytvb.report.timings import read_timings
from raytvb.search.results import Choice
from raytvb.storage import records
from raytvb.storage.records import Record
from raytvb.storage.store import Store


def summarise(store: Store, whole: Experiment) -> Summary:
    """The results of an experiment, built from the tasks that are there.

    Raises UserError if results are missing. The message names the stage to run, and the tasks that
    are not there as the experiment asks for them.
    """
    parts = missing_parts(store, whole)
    try:
        return _summary(store, whole, parts)
    except UserError as error:
        if not parts:
            raise
        raise UserError(f"{error}\n{built_from(whole, parts)}") from None


def _summary(store: Store, whole: Experiment, parts: Sequence[FailedPart]) -> Summary:
    experiment = without(whole, parts)
    gram, base = _gram_and_base(store, experiment)
    precision = _precision(store)
    search = finished_search(store, experiment, precision.use)
    models = read_rows(store, SINGLE_MODELS)
    fine_tuned, name = accuracies_of(models, "fine-tuned"), search.choice.name
    subjects = ["full"] if name is None else ["full", name]
    bases = _basis_metrics(store, experiment)
    entries = Entries(store, search, bases, gram, fine_tuned).all()
    addition, random_subset = _by_origin(entries, search)
    parameters = base.metrics_as(BaseMetrics, store.where(BASE)).parameters
    fingerprint = base.parent("fingerprint", store.where(BASE))
    return Summary(
        tasks=experiment.task_names,
        missing=tuple(MissingTask(**asdict(part)) for part in parts),
        zero_shot=accuracies_of(models, "zero-shot"),
        fine_tuned=fine_tuned,
        addition=addition,
        random_subset=random_subset,
        additions=tuple(named_additions(store, experiment, subjects, fine_tuned)),
        negation=negations(store, experiment, "full"),
        negation_basis=negations(store, experiment, name),
        unseen=unseen_entries(store, experiment) if name is not None else {},
        disentanglement=tuple(disentanglements(store, experiment, subjects)),
        online=_online(store, search),
        mask_overlap=_mask_overlap(store, experiment),
        chosen=_chosen(search),
        search=search.choice,
        stored_bytes=StoredBytes(**stored_bytes(store, experiment, parameters)),
        seconds=read_timings(store),
        floor={basis: metrics.floor for basis, metrics in bases.items()},
        provenance=_provenance(whole, search.choice, fingerprint, precision),
    )


def _gram_and_base(store: Store, experiment: Experiment) -> tuple[Tensor, Record]:
    """The Gram matrix (T, T) float64, and the record of the pretrained model."""
    gram, base = load_gram(store, experiment), records.find(store, BASE)
    if not experiment.tasks or gram is None or base is None:
        raise UserError(f"{store.url} has no complete results yet: run `raytvb run` first")
    return gram, base


def _by_origin(
    entries: Mapping[str, AdditionEntry], search: FinishedSearch
) -> tuple[dict[str, AdditionEntry], dict[str, AdditionEntry]]:
    """Two groups of entries, by name: full vectors and bases, and random subsets of the tasks."""
    addition: dict[str, AdditionEntry] = {}
    random_subset: dict[str, AdditionEntry] = {}
    for candidate in search.tested:
        group = random_subset if candidate.is_random else addition
        group[candidate.name] = entries[candidate.name]
    return addition, random_subset


def _basis_metrics(store: Store, experiment: Experiment) -> dict[str, BasisMetrics]:
    """The metrics in the record of each basis, by its name."""
    metrics = {}
    for spec in basis_specs(experiment):
        prefix = basis_prefix(spec.name)
        record = records.read_record(store, f"{prefix}/{records.RECORD}")
        metrics[spec.name] = record.metrics_as(BasisMetrics, store.where(prefix))
    return metrics


def _online(store: Store, search: FinishedSearch) -> dict[str, Online]:
    """The online bases that were measured after each arrival, by name."""
    entries = {}
    for candidate in search.arrivals:
        name = candidate.name
        entries[name] = online_entry(store, name, candidate.method, candidate.size)
    return entries


def _mask_overlap(store: Store, experiment: Experiment) -> OverlapMetrics | None:
    """How far the tasks' masks overlap; None if the tasks share one mask."""
    record = records.find(store, OVERLAP) if experiment.own_masks else None
    return None if record is None else record.metrics_as(OverlapMetrics, store.where(OVERLAP))


def _chosen(search: FinishedSearch) -> ChosenBasis | NothingChosen:
    choice, basis = search.choice, search.chosen
    if basis is None:
        return NothingChosen(reason=choice.reason or "no basis is valid")
    outcome = search.outcomes[basis.name]
    return ChosenBasis(
        name=basis.name,
        method=basis.method,
        size=basis.size,
        merge="decoded",
        coefficient=outcome.coefficient,
        own_lengths=outcome.own_lengths,
        objective=outcome.objective,
        tolerance=choice.tolerance,
        stored_bytes=outcome.stored_bytes,
    )


def _precision(store: Store) -> PrecisionMetrics:
    """The number format that evaluations ran in: fp32, unless the store has a record of it."""
    record = records.find(store, PRECISION)
    if record is None:
        return PrecisionMetrics(use="fp32")
    return record.metrics_as(PrecisionMetrics, store.where(PRECISION))


def _provenance(
    experiment: Experiment, choice: Choice, fingerprint: str, precision: PrecisionMetrics
) -> Provenance:
    return Provenance(
        experiment=experiment.identity(),
        base=fingerprint,
        selection=choice.selection,
        test=choice.test,
        precision=precision,
        versions=records.versions(),
    )
