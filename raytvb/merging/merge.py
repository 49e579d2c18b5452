"""From a store to a model: writes any mix of tasks, added or negated, as an open_clip folder.

Read the files of this folder in this order:
    addends.py      what a caller can add: tasks, the sum of a basis, single basis vectors
    mixtures.py     turns addends into weights of stored vectors, and looks up the coefficient
    merge.py        adds a mixture to the pretrained weights; start at `merge`
    folder.py       writes the folder that open_clip loads

theta_new = theta_0 + coefficient * sum_f weights[f] * vectors[f]. With a merge method other than
addition, the vector of that method takes the place of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike

import torch
from torch import Tensor

from raytvb.errors import UserError, VectorError
from raytvb.experiment.layout import BASE, SEARCH, basis_prefix
from raytvb.experiment.places import output_folder
from raytvb.maths.finite import listed, not_finite
from raytvb.maths.flat_parameters import FlatParameters
from raytvb.merging.addends import Addends, BasisSum, Tasks
from raytvb.merging.folder import check_free, write_folder
from raytvb.merging.mixtures import Mixture, mixture
from raytvb.models.pretrained_model import load_base
from raytvb.search.candidates import ADDITION, FULL
from raytvb.search.merged_vectors import method_direction
from raytvb.search.results import Choice
from raytvb.storage import records
from raytvb.storage.damage import DamagedError
from raytvb.storage.records import Record
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreKeyError
from raytvb.storage.vector_set import Coordinates, VectorSet

ATTEMPTS = 4
"""How often a merge begins anew because a run has replaced what it reads."""


def merged_state(
    state: Mapping[str, Tensor], vectors: Coordinates, weights: Tensor
) -> dict[str, Tensor]:
    """A new state dict: `state` plus sum_f weights[f] * vectors[f], in float32.

    weights: (F,) float64. Raises UserError if the vectors are of another model, and VectorError
    that names the tensors which would not be finite.
    """
    return _with_direction(state, vectors, next(vectors.combinations(weights[:, None])))


def method_state(
    state: Mapping[str, Tensor],
    vectors: Coordinates,
    columns: Tensor,
    merge_method: str,
    coefficient: float,
) -> dict[str, Tensor]:
    """A new state dict: `state` plus coefficient * method(tau_1, ..., tau_n), in float32.

    Args:
        vectors: the F stored vectors.
        columns: (F, n) float64: tau_i = sum_f columns[f, i] * vectors[f].
        merge_method: a method of `maths.merge_registry`; see
            `search.merged_vectors.method_direction`.

    Raises UserError if the vectors are of another model, VectorError that names the tensors which
    would not be finite, and MethodError if the method fails.
    """
    direction = method_direction(vectors, columns, merge_method)
    return _with_direction(state, vectors, direction, coefficient)


def _with_direction(
    state: Mapping[str, Tensor], vectors: Coordinates, direction: Tensor, coefficient: float = 1.0
) -> dict[str, Tensor]:
    """A new state dict: `state` plus coefficient * direction.

    direction: (count,) float32 on the vectors' coordinates, or (D,) over all parameters.
    """
    merged = {}
    for name, tensor in state.items():
        merged[name] = tensor.clone(memory_format=torch.contiguous_format)
    mask = None
    if vectors.mask is not None and len(direction) != vectors.mask.total:
        mask = vectors.mask.load().tensors()
    flat = FlatParameters(_parameters(merged, vectors), mask)
    values = coefficient * direction
    values += flat.gather()
    flat.scatter(values)
    _check_finite(state, merged, vectors)
    return merged


def _check_finite(
    state: Mapping[str, Tensor], merged: Mapping[str, Tensor], vectors: Coordinates
) -> None:
    """Raise VectorError that names the changed tensors with NaN or infinite values.

    The other tensors are those of `state`. A buffer among them may be infinite, as attention masks
    are.
    """
    bad = not_finite({name: merged[name] for name in vectors.parameters})
    if not bad:
        return
    pretrained = not_finite({name: state[name] for name in bad})
    if pretrained:
        raise VectorError(
            f"the pretrained model has NaN or infinite values in {listed(pretrained)}",
            "use a model whose weights are finite",
        )
    if isinstance(vectors, VectorSet):
        for file in vectors.files:
            if file.not_finite():
                raise file.complain().with_remedy("make the vector again, or leave it out")
    raise VectorError(
        f"the merged model would have NaN or infinite values in {listed(bad)}",
        "use smaller weights, or a smaller coefficient",
    )


def _parameters(state: Mapping[str, Tensor], vectors: Coordinates) -> dict[str, Tensor]:
    """The tensors of a state dict that the vectors change.

    Raises UserError if one is missing or has another shape.
    """
    parameters = {}
    for name, shape in vectors.parameters.items():
        if name not in state or tuple(state[name].shape) != tuple(shape):
            raise UserError(
                f"the model has no tensor {name} of shape {tuple(shape)}: the vectors belong "
                f"to another model"
            )
        parameters[name] = state[name]
    return parameters


@dataclass(frozen=True)
class Merged:
    """A merge that has been written."""

    source: str
    """Name of the search's candidate whose coefficient is the default."""
    coefficient: float
    own_lengths: bool
    """Whether decoded vectors were stretched to the lengths of the task vectors."""
    searched: bool
    """Whether the store has a finished search, which may have chosen a basis."""
    covers: tuple[str, ...] | None
    """The tasks that the basis was made of; None for the task vectors themselves."""


def merge(
    store: Store,
    addends: Addends,
    out: str | PathLike[str],
    *,
    basis: str | None = None,
    coefficient: float | None = None,
    overwrite: bool = False,
) -> Merged:
    """Write a merged model to the folder `out`, which open_clip loads as `local-dir:out`.

    Args:
        addends: what is added to the pretrained weights.
        basis: name of the basis to take vectors from, or `full` for the task vectors themselves;
            default: the basis that the search chose, or `full` if it chose none.
        coefficient: factor on the whole merge; default: the value that validation chose for adding
            as many tasks, and 1 for single basis vectors.
        overwrite: whether a model in the folder `out` is replaced. Nothing else is ever replaced.

    Raises UserError for a folder that is not empty or lies in a store, for a basis that is not in
    the store, and for addends that the basis does not have. Raises VectorError for damaged files,
    for weights that are not finite, and for a result that is not finite; ValueError for tasks
    without a vector. After an error the folder is as it was.
    """
    out = output_folder(out, store)
    check_free(out, overwrite=overwrite)
    _check_weights(addends, coefficient)
    choice = _choice(store)
    chosen = None if choice is None else choice.name
    source = basis or chosen or FULL.name
    if isinstance(addends, Tasks):
        addends = _with_lengths(addends, coefficient)
    mixed, merged = _of_one_version(store, source, addends, coefficient)
    write_folder(store, _base(store), merged, out)
    alpha = mixed.setting.coefficient if coefficient is None else coefficient
    covers, searched = mixed.covers, choice is not None
    return Merged(mixed.source, alpha, mixed.setting.own_lengths, searched, covers)


def _of_one_version(
    store: Store,
    source: str,
    addends: Addends,
    coefficient: float | None,
) -> tuple[Mixture, dict[str, Tensor]]:
    """The mixture, and the pretrained state dict with it added.

    All is read as one record of the source says. If a run replaces the source meanwhile, its old
    files are deleted, and the new version is read from the beginning.
    """
    for attempt in range(ATTEMPTS):
        before = _version(store, source)
        try:
            mixed = mixture(store, source, addends, coefficient)
            alpha = mixed.setting.coefficient if coefficient is None else coefficient
            return mixed, _apply(_pretrained_state(store), mixed, addends, alpha)
        except (DamagedError, StoreKeyError):
            if attempt == ATTEMPTS - 1 or _version(store, source) == before:
                raise
    raise AssertionError("unreachable")


def _pretrained_state(store: Store) -> Mapping[str, Tensor]:
    """The state dict of the pretrained model, which is loaded once in a process."""
    fingerprint = _base(store).parent("fingerprint", store.where(BASE))
    return load_base(store.url, fingerprint).model.state_dict()


def _version(store: Store, source: str) -> object:
    """What tells one version of a source from another."""
    prefix = "vectors" if source == FULL.name else basis_prefix(source)
    keys = records.record_keys(store, prefix)
    return keys, store.read_many(keys)


def _check_weights(addends: Addends, coefficient: float | None) -> None:
    """Raise VectorError for a weight or a coefficient that is NaN or infinite."""
    numbers: dict[str, float] = {}
    if coefficient is not None:
        numbers["the coefficient"] = coefficient
    if not isinstance(addends, BasisSum):
        for name, weight in addends.weights.items():
            numbers[f"the weight of {name}"] = weight
    for what, number in numbers.items():
        if not math.isfinite(number):
            raise VectorError(f"{what} is {number}", "use a finite number")


def _base(store: Store) -> Record:
    """The record of the pretrained model."""
    record = records.find(store, BASE)
    if record is None:
        raise UserError(f"{store.url} holds no pretrained model; run `raytvb run` first")
    return record


def _choice(store: Store) -> Choice | None:
    """The choice of the search; None if no search has ended."""
    record = records.find(store, SEARCH)
    return None if record is None else record.metrics_as(Choice, store.where(SEARCH))


def _with_lengths(tasks: Tasks, coefficient: float | None) -> Tasks:
    """The tasks with `lengths` filled in, if the lengths that the search chose do not apply.

    The search chose lengths together with a coefficient of addition. They apply only to that one.
    """
    if tasks.lengths is None and (coefficient is not None or tasks.merge_method != ADDITION):
        return replace(tasks, lengths="projected")
    return tasks


def _apply(
    state: Mapping[str, Tensor], mixed: Mixture, addends: Addends, coefficient: float
) -> dict[str, Tensor]:
    """The state dict with the mixture added."""
    if isinstance(addends, Tasks) and addends.merge_method != ADDITION:
        assert mixed.columns is not None  # there is a column for each task
        method = addends.merge_method
        return method_state(state, mixed.vectors, mixed.columns, method, coefficient)
    return merged_state(state, mixed.vectors, coefficient * mixed.weights)
