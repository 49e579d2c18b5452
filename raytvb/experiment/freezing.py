"""Records which experiment a store was made for.

The first run writes the experiment to `experiment.yaml` in the store. Later runs may ask for other
basis methods, another search or other evaluations, but not for other task vectors.
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
"""Sections that may change while a store lives. What depends on them has its own identity."""

MADE_WITH_BASE = (BASE, "vectors", "splits")
"""Folders that are deleted when another experiment takes over a store that has no vector yet.
Before the first vector, `vectors` holds only heads, and `splits` holds only decoded images."""


@dataclass(frozen=True)
class _Freeze:
    """What freezing an experiment would do to a store."""

    requested: JsonObject
    stored: JsonObject | None
    """The experiment that the store holds; None if it holds none."""
    starts_over: bool
    """Whether the store holds another experiment, of which only the base was made."""


def check_frozen(store: Store, experiment: Experiment) -> None:
    """Check that an experiment can use a store. Nothing is written or deleted.

    It can use a store without an experiment, or with the same one. It can also use a store of
    another experiment that holds only the pretrained model and images. For any other store, raises
    UserError that shows the fields that differ.
    """
    _planned_freeze(store, experiment)


def freeze(store: Store, experiment: Experiment) -> None:
    """Write the experiment to the store, which then belongs to it.

    If the store holds another experiment, of which only the pretrained model and images were made,
    these are deleted first. Raises UserError as `check_frozen` does.
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
    records.find(store, BASE)  # raises UserError for a store of a newer raytvb
    stored = _stored_identity(store, data)
    differing = records.differences(_of_vectors(stored), _of_vectors(requested))
    if differing and _has_more_than_base(store):
        raise UserError(
            f"{store.url} belongs to another experiment:\n  "
            + "\n  ".join(differing)
            + "\nUse another store, or the experiment file that it was made with."
        )
    return _Freeze(requested, stored, starts_over=bool(differing))


def _stored_identity(store: Store, data: bytes) -> JsonObject:
    """The experiment in a store's file. Raises UserError if the file is damaged."""
    try:
        stored = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError):
        stored = None
    if not isinstance(stored, dict):
        raise UserError(
            f"{store.where(EXPERIMENT)} is damaged: it is not an experiment. Delete this file and "
            f"run again with the experiment file that the store was made with"
        )
    return stored


def _has_more_than_base(store: Store) -> bool:
    """Whether a mask, a vector or anything made of vectors has a record."""
    for key in store.keys():
        if key.endswith(f"/{records.RECORD}") and not key.startswith((f"{BASE}/", "splits/")):
            return True
    return False


def _of_vectors(identity: JsonObject) -> JsonObject:
    """The fields that a store's vectors and bases depend on, which may not change."""
    fields = {k: v for k, v in identity.items() if k not in CHANGEABLE}
    basis: JsonObject = {"prepare": "none"}  # older experiments have no such field
    stored_basis = identity.get("basis")
    if isinstance(stored_basis, dict):
        basis |= stored_basis
    basis.pop("method", None)
    return fields | {"basis": basis}
