"""What bases of any size would lose, computed from the Gram matrix of the vectors so far."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from raytvb.errors import UserError, listed
from raytvb.experiment.layout import BASE
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.present_experiments import store_metrics, stored_experiment
from raytvb.experiment.stored_vectors import basis_vectors_of
from raytvb.maths.basis_fit import fit_basis, task_errors
from raytvb.storage import records
from raytvb.storage.contract import Contract, JsonObject
from raytvb.storage.gram_state import GramState
from raytvb.storage.store import Store


class SpectrumFit(Contract):
    """One basis fitted to the vectors so far."""

    method: str
    size: int
    """M, the number of basis vectors."""
    loss: float
    """Relative squared error of all vectors together."""
    floor: float
    """Least such error that any M vectors can have."""
    per_task: dict[str, float]
    """Relative squared error of each task's vector."""
    notes: tuple[str, ...]
    """Warnings of the method."""


class Spectrum(Contract):
    """The spectrum of the Gram matrix of the vectors so far."""

    tasks: tuple[str, ...]
    """Tasks in the order of their arrival."""
    share: tuple[float, ...]
    """Eigenvalues as shares of their sum, falling."""
    floor: tuple[float, ...]
    """Least relative error of 1, 2, … basis vectors."""
    fit: SpectrumFit | None = None
    """The fitted basis; None if no size was given."""
    notes: tuple[str, ...] = ()
    """Which vectors of the experiment are not in it."""

    def to_json(self) -> JsonObject:
        """Plain values, without `fit` where no size was given, and without `notes` if none."""
        fields = self.model_dump(mode="json", exclude_none=True)
        return fields if self.notes else {k: v for k, v in fields.items() if k != "notes"}


def spectrum_of(store: Store, method: str = "ae", size: int | None = None) -> Spectrum:
    """The spectrum of the stored Gram matrix, and the fit of a basis of `size` vectors.

    Only the present vectors of the experiment that ran last count. Rows of other tasks, and of
    vectors that were made again since, are left out.

    Raises UserError if no vector has been taken in yet, and ValueError as `fit_basis`.
    """
    records.find(store, BASE)  # UserError for a store of a newer raytvb
    state = GramState.read(store)
    if not state.tasks:
        raise UserError(
            f"{store.url} has no Gram matrix yet: `raytvb run` or `raytvb basis` writes it, vector "
            f"by vector"
        )
    tasks, notes = _present(store, state)
    if not tasks:
        raise UserError(
            f"the Gram matrix of {store.url} has none of the present vectors: `raytvb run` or "
            f"`raytvb basis` takes them in"
        )
    gram = state.ordered(tasks)
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    share = values / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return Spectrum(
        tasks=tuple(tasks),
        share=tuple(share.tolist()),
        floor=tuple((1 - share.cumsum(0)).clamp(min=0).tolist()),
        fit=None if size is None else _fit_of(gram, tasks, method, size),
        notes=notes,
    )


def _present(store: Store, state: GramState) -> tuple[list[str], tuple[str, ...]]:
    """The tasks whose rows count, in the order of their arrival, and notes on the others.

    All rows count if the store has no experiment that this version can read.
    """
    stored = stored_experiment(store)
    fields = {**(stored or {}), "store": store.url, "vectors": store_metrics(store).vectors}
    try:
        experiment = parse_experiment(fields)
    except UserError:
        return state.tasks, ()
    vectors = basis_vectors_of(experiment, experiment.task_names)
    tasks = []
    for task in state.tasks:
        if task in vectors and vectors[task].checksum == state.checksums[task]:
            tasks.append(task)
    absent = [task for task in experiment.task_names if task not in tasks]
    if not absent:
        return tasks, ()
    count = f"{len(absent)} of {len(experiment.task_names)} task vectors"
    return tasks, (f"{count} are not in it yet: {listed(absent)}",)


def _fit_of(gram: Tensor, tasks: list[str], method: str, size: int) -> SpectrumFit:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        fit = fit_basis(gram, size, method=method)
    errors: list[float] = task_errors(gram, fit).tolist()
    return SpectrumFit(
        method=method,
        size=fit.size,
        loss=fit.loss,
        floor=fit.floor,
        per_task=dict(zip(tasks, errors, strict=True)),
        notes=tuple(str(warning.message) for warning in caught),
    )


def describe_spectrum(spectrum: Spectrum) -> str:
    """The fit as lines of text; if there is no fit, the number of vectors."""
    fit, lines = spectrum.fit, [f"note: {note}" for note in spectrum.notes]
    if fit is None:
        return "\n".join([*lines, f"task vectors so far: {len(spectrum.tasks)}"])
    lines += [f"note: {note}" for note in fit.notes]
    lines.append(
        f"{fit.method} with {fit.size} vectors: relative error {fit.loss:.4f} "
        f"(least {fit.floor:.4f})"
    )
    for task, error in fit.per_task.items():
        lines.append(f"  {task}  {error:.4f}")
    return "\n".join(lines)
