"""Which experiments use a store.

    record.json, experiment.yaml   the experiment that ran last
    experiments/<name>/            the latest version of each experiment, by its name

All experiments of a store have the same pretrained model. Everything else may change from run to
run, because every stored thing has an identity of its own. These records say what the things of a
store are still needed for. A store of format 1 has only `experiment.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping

import yaml
from pydantic import TypeAdapter, ValidationError

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import base_identity
from raytvb.experiment.layout import BASE, EXPERIMENT, EXPERIMENTS, TIMINGS
from raytvb.experiment.metrics import StoreMetrics
from raytvb.experiment.yaml_text import YamlTextError, parse_yaml
from raytvb.storage import records
from raytvb.storage.contract import JsonObject
from raytvb.storage.damage import DamagedError
from raytvb.storage.replacing import delete_thing
from raytvb.storage.sealed_json import not_finite
from raytvb.storage.store import Store

MADE_WITH_BASE = (BASE, "heads", "splits", "failed", EXPERIMENTS, TIMINGS)
"""Folders that hold nothing made from a task's training. They are deleted when an experiment with
another model takes over a store that has no mask and no vector yet.
"""


def check_model(store: Store, experiment: Experiment) -> None:
    """Check that an experiment can use a store. Nothing is written or deleted.

    Raises UserError, which shows the fields that differ, if the store has masks, vectors or bases
    of another pretrained model.
    """
    differing = _other_model(store, experiment)
    if differing and _has_more_than_base(store):
        raise UserError(
            f"{store.url} belongs to another pretrained model:\n  "
            + "\n  ".join(differing)
            + "\nUse another store, or the model that it was made with."
        )


def record_experiment(store: Store, experiment: Experiment, *, grows: bool) -> None:
    """Write the experiment to the store, which it uses from now on.

    If the store holds another pretrained model and nothing made with it, that model is deleted
    first. Nothing is written if the store has this experiment already. Raises UserError as
    `check_model` does.

    grows: whether the run is going to make vectors. Results of earlier formats do not say which
    vectors they were measured on, and no longer count then.
    """
    check_model(store, experiment)
    if _other_model(store, experiment):
        for folder in MADE_WITH_BASE:
            delete_thing(store, folder)
        store.delete("vectors")  # in format 1, the heads of tasks without a vector
    identity = experiment.identity()
    before, stored = records.find(store, ""), stored_experiment(store)
    is_dated = stored is None or grows or _of_vectors(stored) != _of_vectors(identity)
    if before is not None:
        is_dated = is_dated or store_metrics(store).dated
    metrics = StoreMetrics(name=experiment.name, vectors=experiment.vectors, dated=is_dated)
    document = yaml.safe_dump(identity, sort_keys=False, allow_unicode=True).encode()
    is_same = before is not None and before.identity == identity
    if not is_same or store_metrics(store) != metrics or store.find(EXPERIMENT) != document:
        if is_same and not is_dated:
            return  # a store of an earlier format, in which nothing changes
        files = {EXPERIMENT: document}
        records.commit(store, "", identity=identity, metrics=metrics, files=files)
    if is_dated:
        _record_by_name(store, experiment.name, identity)


def _record_by_name(store: Store, name: str, identity: JsonObject) -> None:
    prefix = f"{EXPERIMENTS}/{name}"
    record = records.find(store, prefix)
    if record is None or record.identity != identity:
        records.commit(store, prefix, identity=identity)


def store_metrics(store: Store) -> StoreMetrics:
    """What the store's own record says beside the experiment."""
    record = records.find(store, "")
    return StoreMetrics() if record is None else record.metrics_as(StoreMetrics, store.where(""))


def present_experiments(store: Store) -> Mapping[str, JsonObject]:
    """The latest version of each experiment of a store, by its name.

    A store of an earlier format has one experiment, whose name is not known.
    """
    experiments = {}
    for prefix, record in records.find_all(store, EXPERIMENTS).items():
        experiments[prefix.removeprefix(f"{EXPERIMENTS}/")] = record.identity
    if not experiments:
        stored = stored_experiment(store)
        return {} if stored is None else {"": stored}
    return experiments


def stored_experiment(store: Store) -> JsonObject | None:
    """The identity of the experiment that ran last in a store; None if there was none.

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
        identity = TypeAdapter(JsonObject).validate_python(parse_yaml(data))
    except (YamlTextError, ValidationError):
        identity = None
    if identity is None or not_finite(identity):
        raise DamagedError(
            f"{store.where(EXPERIMENT)} is damaged: it is not an experiment",
            "delete this file and run again with the experiment file that the store was made with",
        )
    return identity


def _other_model(store: Store, experiment: Experiment) -> list[str]:
    """In which fields the store's pretrained model differs from the experiment's."""
    record = records.find(store, BASE)
    if record is not None:
        return records.differences(record.identity, base_identity(experiment))
    stored = stored_experiment(store)
    if stored is None:
        return []
    return records.differences({"model": stored.get("model")}, base_identity(experiment))


def _has_more_than_base(store: Store) -> bool:
    """Whether a mask, a vector or anything made of vectors has a record."""
    for key in store.keys():
        folder = key.partition("/")[0]
        if key.endswith(f"/{records.RECORD}") and folder not in MADE_WITH_BASE:
            return True
    return False


def _of_vectors(identity: JsonObject) -> JsonObject:
    """The fields that a store's vectors and bases depend on."""
    fields = {k: v for k, v in identity.items() if k not in ("search", "evaluate")}
    basis: JsonObject = {"prepare": "none"}  # older experiments have no such field
    stored_basis = identity.get("basis")
    if isinstance(stored_basis, dict):
        basis |= stored_basis
    basis.pop("method", None)
    return fields | {"basis": basis}
