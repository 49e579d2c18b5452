"""Records which experiment a store was made for.

The first run writes the experiment to the store's own record, and to `experiment.yaml` for people.
Later runs may ask for other basis methods, another search or other evaluations, but not for other
task vectors. They may only change a task of which nothing has been made yet, to mend its data. A
store of format 1 has only `experiment.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass

import yaml
from pydantic import TypeAdapter, ValidationError

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import BASE, EXPERIMENT, TIMINGS
from raytvb.experiment.unused_tasks import with_unused_tasks
from raytvb.experiment.yaml_text import YamlTextError, parse_yaml
from raytvb.storage import records
from raytvb.storage.contract import JsonObject
from raytvb.storage.damage import DamagedError
from raytvb.storage.replacing import delete_thing
from raytvb.storage.store import Store

CHANGEABLE = ("search", "evaluate")
"""Sections that may change while a store lives. What depends on them has its own identity."""

MADE_WITH_BASE = (BASE, "heads", "splits", "failed", TIMINGS)
"""Folders that hold nothing made from a task's training. They are deleted when another experiment
takes over a store that has no mask and no vector yet.
"""


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
            delete_thing(store, folder)
        store.delete("vectors")  # in format 1, the heads of tasks without a vector
    document = yaml.safe_dump(change.requested, sort_keys=False, allow_unicode=True).encode()
    is_stored = records.find(store, "") is not None and store.find(EXPERIMENT) == document
    if change.stored != change.requested or not is_stored:
        records.commit(store, "", identity=change.requested, files={EXPERIMENT: document})


def _planned_freeze(store: Store, experiment: Experiment) -> _Freeze:
    requested = experiment.identity()
    stored = stored_experiment(store)
    if stored is None:
        return _Freeze(requested, None, starts_over=False)
    differing = records.differences(_of_vectors(stored), _of_vectors(requested))
    if differing and _has_more_than_base(store):
        mended = with_unused_tasks(store, stored, requested)
        differing = records.differences(_of_vectors(mended), _of_vectors(requested))
        if not differing:
            return _Freeze(requested, stored, starts_over=False)
        raise UserError(
            f"{store.url} belongs to another experiment:\n  "
            + "\n  ".join(differing)
            + "\nUse another store, or the experiment file that it was made with."
        )
    return _Freeze(requested, stored, starts_over=bool(differing))


def stored_experiment(store: Store) -> JsonObject | None:
    """The identity of the experiment that a store belongs to; None if it holds none.

    Raises DamagedError if the store's record or file cannot be read, and UserError for a store of a
    newer raytvb.
    """
    record = records.find(store, "")
    if record is not None:
        return record.identity
    data = store.find(EXPERIMENT)
    if data is None:
        return None
    records.find(store, BASE)  # raises UserError for a store of a newer raytvb
    return _first_format_identity(store, data)


def _first_format_identity(store: Store, data: bytes) -> JsonObject:
    """The experiment in the file of a store without a record."""
    try:
        return TypeAdapter(JsonObject).validate_python(parse_yaml(data))
    except (YamlTextError, ValidationError):
        raise DamagedError(
            f"{store.where(EXPERIMENT)} is damaged: it is not an experiment",
            "delete this file and run again with the experiment file that the store was made with",
        ) from None


def _has_more_than_base(store: Store) -> bool:
    """Whether a mask, a vector or anything made of vectors has a record."""
    for key in store.keys():
        folder = key.partition("/")[0]
        if key.endswith(f"/{records.RECORD}") and folder not in MADE_WITH_BASE:
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
