"""Who reads each file of a store for work, and what they make of it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from raytvb.bases.online import read_tables
from raytvb.data.split_cache import cached_split
from raytvb.errors import UserError, VectorError
from raytvb.evaluation.rows import read_pair_rows, read_rows
from raytvb.experiment.config import Experiment
from raytvb.experiment.present_experiments import stored_experiment
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.stored import load_coefficients
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.checkpoints import CheckpointFolder
from raytvb.models.heads import load_head
from raytvb.models.open_clip_models import Encoder
from raytvb.models.pretrained_model import load_base
from raytvb.report.summary_contracts import read_summary
from raytvb.storage import checked_file, records
from raytvb.storage.gram_state import GramState
from raytvb.storage.masks import MaskFile
from raytvb.storage.records import RECORD, prefix_of
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError
from raytvb.storage.stored_basis import StoredBasis
from raytvb.storage.vectors import VectorFile

Reader = Callable[[], Any]


class RemadeError(Exception):
    """The reader takes the file for absent, and would make it anew."""


class Readers:
    """The readers of the files of one local store, each as in a process of its own."""

    def __init__(self, store: Store, experiment: Experiment) -> None:
        """The store must be whole."""
        self.store, self._experiment = store, experiment
        self.record_keys: dict[str, str] = {}
        """The record that lists a file, by the key of the file. A record lists itself."""
        for prefix, record in records.find_all(store).items():
            key = records.record_key(prefix)
            self.record_keys[key] = key
            for name in record.files:
                self.record_keys[records.file_key(prefix, name)] = key
        base = records.find(store, "base")
        assert base is not None
        self._fingerprint = base.parents["fingerprint"]
        self._encoder: Encoder = load_base(store.url, self._fingerprint)
        self._tasks = {task.name: task for task in experiment.every_task}

    def of(self, key: str) -> Reader | None:
        """What reads a file for work; None if nothing does: it is for people, or replaced."""
        store, prefix = self.store, prefix_of(key)
        folder, _, rest = prefix.partition("/")
        name = key.removeprefix(f"{prefix}/")
        if name == RECORD and prefix:
            return lambda: records.find(store, prefix)
        match folder:
            case "":
                return None if key == "experiment.yaml" else lambda: stored_experiment(store)
            case "base":
                return lambda: load_base.__wrapped__(store.url, self._fingerprint)
            case "heads":
                return lambda: load_head(self._task_store(rest), self._encoder)
            case "masks":
                return lambda: MaskFile(store, key).load()
            case "vectors" if rest.endswith("/checkpoint"):
                return lambda: self._checkpoint(rest.removesuffix("/checkpoint"))
            case "vectors" | "prepared":
                return lambda: self._values(key)
            case "gram" if name != "owner.json":
                return lambda: GramState.read(store)
            case "basis" if name.startswith("coefficients"):
                return lambda: load_coefficients(store, rest)
            case "basis":
                return lambda: list(StoredBasis(store, prefix).blocks())
            case "online" if "/" in rest:
                return lambda: list(StoredBasis(store, prefix).blocks())
            case "online":
                return lambda: self._tables(prefix, int(name.split(".")[0].split("-")[1]))
            case "evals" if rest == "disentanglement":
                return lambda: read_pair_rows(store, rest)
            case "evals":
                return lambda: read_rows(store, rest)
            case "splits":
                split, _, task = rest.partition("/")
                return lambda: self._split(self._tasks[task], split)
            case "report" if name == "summary.json":
                return lambda: read_summary(store)
        return None

    def _task_store(self, name: str) -> TaskStore:
        return TaskStore(self._experiment, self._tasks[name])

    def _checkpoint(self, task: str) -> Any:
        found = CheckpointFolder(self._task_store(task)).load()
        if found is None:
            raise RemadeError
        return found

    def _values(self, key: str) -> Any:
        vector = VectorFile(self.store, key)
        return vector.values(0, vector.stored)

    def _tables(self, prefix: str, count: int) -> Any:
        record = records.read_record(self.store, records.record_key(prefix))
        return read_tables(self.store, prefix, record, count)

    def _split(self, task: TaskConfig, split: str) -> Any:
        return cached_split(self.store, task, split, self._encoder.preprocess)


def made_anew(*_: object, **__: object) -> Any:
    """Stands for what makes a head or decodes images."""
    raise RemadeError


@contextmanager
def nothing_is_made() -> Iterator[None]:
    """Whatever would make a head or decode images raises RemadeError."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raytvb.models.heads.write_head", made_anew)
        patch.setattr("raytvb.data.split_cache.load_split", made_anew)
        yield


def used(reader: Reader, where: str) -> str | None:
    """What is wrong with how a damaged file is read, in a process that has not read it before.

    None if it is made anew, or refused by an error that names it. where: the path of the file.
    """
    checked_file._CHECKED.clear()
    try:
        reader()
    except RemadeError:
        return None
    except (UserError, VectorError, StoreError) as error:
        return None if where in str(error) else f"another file is named: {error}"
    except Exception as error:  # a raw error is what this looks for
        return f"a raw error: {error!r}"
    return "it is used"


def kind_of(key: str) -> str:
    """Files of one kind are read by the same code."""
    *folders, name = key.split("/")
    folder, middle = folders[0] if folders else "", folders[1:]
    if "checkpoint" in middle:
        folder = "checkpoint"
    return f"{folder}/{len(middle)}/{re.sub('[0-9a-f]{6,}|[0-9]{5}', '#', name)}"


def one_of_each_kind(store: Store) -> list[str]:
    """The smallest file of each kind."""
    chosen: dict[str, str] = {}
    for key, _ in sorted(store.sizes().items(), key=lambda item: item[1], reverse=True):
        chosen[kind_of(key)] = key
    return sorted(chosen.values())


def places(key: str, size: int, count: int) -> list[tuple[int, int]]:
    """Random places of a file as (byte, bit), the same in every run. Not more than it has bits."""
    bits = random.Random(key).sample(range(8 * size), min(count, 8 * size))
    return [divmod(place, 8) for place in bits]


def equal(left: Any, right: Any) -> bool:
    """Whether two readers found the same values."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)
