"""The experiment that a store was made for.

A store keeps what was asked in `experiment.yaml`, written at the first run. Later runs may ask for
other basis methods, another search or other evaluations, but not for other task vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import BASE, EXPERIMENT
from raytvb.storage import records
from raytvb.storage.contract import JsonObject
from raytvb.storage.store import Store

CHANGEABLE = ("search", "evaluate")
"""Sections that may change while a store lives: what depends on them has an identity of its own."""

MADE_WITH_BASE = (BASE, "vectors", "splits")
"""What is deleted where a store is given to another experiment: before the first vector, `vectors`
has no more than heads, and `splits` no more than decoded images."""


@dataclass(frozen=True)
class _Freeze:
    """What freezing an experiment would do to a store."""

    requested: JsonObject
    stored: JsonObject | None
    """The experiment of the store; None where there is none."""
    starts_over: bool
    """The store is of another experiment, but nothing but its base was made."""


def check_frozen(store: Store, experiment: Experiment) -> None:
    """Check that a store can be used for an experiment. Nothing is written or deleted.

    A store without an experiment can be, and one in which nothing but the pretrained model and
    images were stored. Raises UserError for a store of another experiment; the message shows the
    fields that differ.
    """
    _planned_freeze(store, experiment)


def freeze(store: Store, experiment: Experiment) -> None:
    """Make the store one of this experiment: write what is asked.

    A store of another experiment in which nothing but the pretrained model and images were stored
    is emptied first. Raises UserError as `check_frozen`.
    """
    change = _planned_freeze(store, experiment)
    if change.starts_over:
        for folder in MADE_WITH_BASE:
            store.delete(folder)
    if change.stored != change.requested:
        document = yaml.safe_dump(change.requested, sort_keys=False, allow_unicode=True)
        store.write(EXPERIMENT, document.encode())


def _planned_freeze(store: Store, experiment: Experiment) -> _Freeze:
    requested = experiment.identity()
    data = store.find(EXPERIMENT)
    if data is None:
        return _Freeze(requested, None, starts_over=False)
    records.find(store, BASE)  # UserError for a store of a newer raytvb
    stored = yaml.safe_load(data)
    differing = records.differences(_of_vectors(stored), _of_vectors(requested))
    if differing and _has_more_than_base(store):
        raise UserError(
            f"{store.url} belongs to another experiment:\n  "
            + "\n  ".join(differing)
            + "\nUse another store, or the experiment file that it was made with."
        )
    return _Freeze(requested, stored, starts_over=bool(differing))


def _has_more_than_base(store: Store) -> bool:
    """Whether a mask, a vector or anything made of vectors has a record."""
    for key in store.keys():
        if key.endswith(f"/{records.RECORD}") and not key.startswith((f"{BASE}/", "splits/")):
            return True
    return False


def _of_vectors(identity: JsonObject) -> JsonObject:
    """The fields that a store's vectors and bases depend on, which may not change."""
    fields = {k: v for k, v in identity.items() if k not in CHANGEABLE}
    basis: JsonObject = {"prepare": "none"}  # experiments of before there was a choice
    stored_basis = identity.get("basis")
    if isinstance(stored_basis, dict):
        basis |= stored_basis
    basis.pop("method", None)
    return fields | {"basis": basis}
