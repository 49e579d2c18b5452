"""Compares the store of a disturbed run with that of a quiet run of the same experiment."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from raytvb.errors import VectorError
from raytvb.experiment.basis_specs import basis_specs
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import online_prefix, vector_prefix
from raytvb.experiment.metrics import OnlineMetrics
from raytvb.storage import records
from raytvb.storage.gram_rows import PREFIX as GRAM
from raytvb.storage.gram_state import GramState, Snapshot
from raytvb.storage.records import Record
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError

COMPARED = ("masks", "vectors", "online", "basis")
"""Folders whose tensor files must have the same bytes."""

UNFINISHED = re.compile(r"/checkpoint/|^online/.+/\d{6}/")
TAG = re.compile(r"-[0-9a-f]{8}(?=[-.])")


@dataclass(frozen=True)
class Comparison:
    """What is wrong with the results of a disturbed run."""

    lost: tuple[str, ...]
    """Tasks whose vector is missing, or is not what its record says."""
    duplicated: tuple[str, ...]
    """Where a vector is counted more than once, or one that nobody made: place and task."""
    differing: tuple[str, ...]
    """Files, and the Gram matrix, whose bits differ from those of the quiet run."""


def compare(experiment: Experiment, quiet: Store, disturbed: Store) -> Comparison:
    """Compare everything up to the bases. Both stores have finished runs of the experiment."""
    return Comparison(
        lost=tuple(_lost(experiment, disturbed)),
        duplicated=tuple(_duplicated(experiment, disturbed)),
        differing=tuple(_differing(experiment, quiet, disturbed)),
    )


def _lost(experiment: Experiment, store: Store) -> Iterator[str]:
    found = records.find_all(store, "vectors")
    for task in experiment.task_names:
        prefix = vector_prefix(task)
        record = found.get(prefix)
        names = record.files if record else ()
        if record is None or not all(_is_whole(store, prefix, n, record) for n in names):
            yield task


def _duplicated(experiment: Experiment, store: Store) -> Iterator[str]:
    expected = experiment.task_names
    record = records.find(store, GRAM)
    if record is not None:
        snapshot = record.metrics_as(Snapshot, store.where(GRAM))
        yield from _extra(GRAM, snapshot.tasks, expected)
        arrivals = max((arrival.vectors for arrival in snapshot.history), default=0)
        if arrivals > len(expected):
            yield f"{GRAM}: {arrivals} arrivals"
    for spec in basis_specs(experiment):
        if spec.online:
            prefix = online_prefix(spec.name)
            record = records.find(store, prefix)
            if record is not None:
                metrics = record.metrics_as(OnlineMetrics, store.where(prefix))
                yield from _extra(prefix, metrics.tasks, expected)


def _extra(place: str, tasks: Sequence[str], expected: Sequence[str]) -> Iterator[str]:
    """The tasks that are there more often than once."""
    extra = Counter(tasks)
    extra.subtract(dict.fromkeys(expected, 1))
    for task, count in sorted(extra.items()):
        if count > 0:
            yield f"{place}: {task}"


def _differing(experiment: Experiment, quiet: Store, disturbed: Store) -> Iterator[str]:
    for folder in COMPARED:
        ours, theirs = _files(disturbed, folder), _files(quiet, folder)
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                yield key
    if not _same_gram(experiment, quiet, disturbed):
        yield GRAM


def _files(store: Store, folder: str) -> dict[str, str]:
    """Checksums of the tensor files that the records in a folder name, by key; '' for a file that
    is not what its record says.

    A basis that replaced another one has a tag in the names of its files, which is left out. So are
    checkpoints, since a run that was killed may leave one behind, and the vectors of unfinished
    online bases: the finished ones are in the folder of bases.
    """
    files: dict[str, str] = {}
    for prefix, record in records.find_all(store, folder).items():
        for name, info in record.files.items():
            if name.endswith(".safetensors") and not UNFINISHED.search(f"{prefix}/{name}"):
                is_whole = _is_whole(store, prefix, name, record)
                files[f"{prefix}/{TAG.sub('', name)}"] = info.sha256 if is_whole else ""
    return files


def _is_whole(store: Store, prefix: str, name: str, record: Record) -> bool:
    try:
        records.read_file(store, prefix, name, record)
    except (StoreError, VectorError):
        return False
    return True


def _same_gram(experiment: Experiment, quiet: Store, disturbed: Store) -> bool:
    """Whether both Gram matrices have the same bits, whatever the order of the arrivals was."""
    grams = []
    for store in (quiet, disturbed):
        try:
            grams.append(GramState.read(store).ordered(experiment.task_names))
        except ValueError:  # it lacks a vector, or is damaged
            return False
    return torch.equal(*grams)
