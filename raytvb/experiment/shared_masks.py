"""The masks that all tasks share. A store has one, until it is made anew.

The first one is `masks/shared`. One that was made anew with `raytvb run --renew mask` is
`masks/shared-2`, and so on; the last one is in force. The masks before it stay, because vectors and
bases were made on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import mask_identity, mask_settings
from raytvb.experiment.layout import MASK, SHARED_MASK, mask_prefix
from raytvb.experiment.metrics import MaskMetrics
from raytvb.storage import records
from raytvb.storage.records import Record, differences, prefix_of
from raytvb.storage.store import Store

_ID = re.compile(rf"masks/({SHARED_MASK}(?:-([0-9]+))?)")


@dataclass(frozen=True)
class SharedMask:
    """A mask that all tasks share, in a store."""

    id: str
    record: Record
    where: str
    """Its folder, for messages."""

    @property
    def fingerprint(self) -> str:
        """The fingerprint of its bits."""
        return self.record.parent("mask", self.where)

    @property
    def key(self) -> str:
        """Key of its file."""
        return f"{mask_prefix(self.id)}/{MASK}"

    @property
    def scored(self) -> tuple[str, ...]:
        """The tasks from whose scores it was made, in their order."""
        tasks = self.record.identity.get("tasks")
        names = []
        for task in tasks if isinstance(tasks, list) else ():
            if isinstance(task, dict):
                names.append(str(task.get("name")))
        return tuple(names)


def shared_mask_ids(store: Store) -> list[str]:
    """The ids of the shared masks that have a record, from the first to the last."""
    return _ids(records.record_keys(store, "masks"))


def last_id(keys: Iterable[str]) -> list[str]:
    """The id of the shared mask in force, among the keys of a store; empty if there is none."""
    return _ids(key for key in keys if key.endswith(f"/{records.RECORD}"))[-1:]


def _ids(keys: Iterable[str]) -> list[str]:
    numbers: dict[int, str] = {}
    for key in keys:
        match = _ID.fullmatch(prefix_of(key))
        if match:
            numbers[int(match[2] or 1)] = match[1]
    return [numbers[number] for number in sorted(numbers)]


def next_mask_id(store: Store) -> str:
    """The id of the mask that is made next."""
    ids = shared_mask_ids(store)
    if not ids:
        return SHARED_MASK
    match = _ID.fullmatch(mask_prefix(ids[-1]))
    assert match is not None
    return f"{SHARED_MASK}-{int(match[2] or 1) + 1}"


def last_shared_mask(store: Store) -> SharedMask | None:
    """The shared mask that is in force, whatever its settings; None if there is none."""
    ids = shared_mask_ids(store)
    if not ids:
        return None
    prefix = mask_prefix(ids[-1])
    record = records.find(store, prefix)
    return None if record is None else SharedMask(ids[-1], record, store.where(prefix))


def mask_changes(mask: SharedMask, experiment: Experiment) -> list[str]:
    """The settings in which a shared mask differs from what an experiment asks for.

    The tasks do not count: a mask stays as it is if tasks come or go.
    """
    wanted = mask_settings(mask_identity(experiment, []))
    return differences(mask_settings(mask.record.identity), wanted)


def in_force(store: Store, experiment: Experiment) -> SharedMask | None:
    """The shared mask in force, whatever its settings; None if there is none.

    A store without a mask uses that of the store that the experiment takes vectors from.
    """
    mask = last_shared_mask(store)
    if mask is None and experiment.vectors is not None:
        return last_shared_mask(Store(experiment.vectors))
    return mask


def find_shared_mask(store: Store, experiment: Experiment) -> SharedMask | None:
    """As `in_force`.

    Raises UserError that shows the differing fields if the mask was made with other settings.
    """
    mask = in_force(store, experiment)
    differing = [] if mask is None else mask_changes(mask, experiment)
    if mask is not None and differing:
        raise UserError(
            f"{mask.where} was made with other settings:\n  "
            + "\n  ".join(differing)
            + "\nBring these settings back, or start the mask anew with `raytvb run --renew mask`: "
            "all vectors and bases are then made again, too."
        )
    return mask


def copy_mask(source: Store, target: Store, key: str) -> None:
    """Copy a mask with its record into another store, unless that has a mask under this key.

    What is made of vectors of another store names their mask by a path in its own store.
    """
    prefix = prefix_of(key)
    if source.url == target.url or records.find(target, prefix) is not None:
        return
    record = records.find(source, prefix)
    if record is None:
        return
    name = key.removeprefix(f"{prefix}/")
    records.commit(
        target,
        prefix,
        identity=record.identity,
        metrics=record.metrics_as(MaskMetrics, source.where(prefix)),
        files={name: records.read_file(source, prefix, name, record)},
        parents=record.parents,
    )
