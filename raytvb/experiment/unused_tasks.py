"""Tasks of a store's experiment of which nothing has been made yet, and which may still change."""

from __future__ import annotations

from pydantic import JsonValue

from raytvb.experiment.layout import SHARED_MASK, mask_prefix, vector_prefix
from raytvb.storage import records
from raytvb.storage.contract import JsonObject
from raytvb.storage.store import Store


def with_unused_tasks(store: Store, stored: JsonObject, requested: JsonObject) -> JsonObject:
    """The stored experiment, but with the fields of its unused tasks as they are requested.

    A task is unused while it has no vector and no mask is made from its scores. So a mistake in the
    data of one task can be mended after the others are done. Names and order stay.
    """
    before, now = stored.get("tasks"), requested.get("tasks")
    if not isinstance(before, list) or not isinstance(now, list) or len(before) != len(now):
        return stored
    tasks: list[JsonValue] = []
    scored = _scored(store)
    for old, new in zip(before, now, strict=True):
        name = _name(old)
        is_mended = old != new and name is not None and name == _name(new)
        is_used = is_mended and (name in scored or _is_used(store, str(name)))
        tasks.append(new if is_mended and not is_used else old)
    return {**stored, "tasks": tasks}


def _name(task: JsonValue) -> JsonValue:
    return task.get("name") if isinstance(task, dict) else None


def _is_used(store: Store, name: str) -> bool:
    """Whether a task has a vector, or a mask of its own."""
    prefixes = (vector_prefix(name), mask_prefix(name))
    return any(records.find(store, prefix) is not None for prefix in prefixes)


def _scored(store: Store) -> set[str]:
    """Names of the tasks from whose scores the shared mask is made; empty without such a mask."""
    mask = records.find(store, mask_prefix(SHARED_MASK))
    scored = None if mask is None else mask.identity.get("tasks")
    return {str(_name(task)) for task in scored} if isinstance(scored, list) else set()
