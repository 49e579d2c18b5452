"""Requests to the store: what one task vector costs on its way from fine-tuning into the bases.

Every request takes some 30 ms on S3, so a walk that looks the same thing up again is slow there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raytvb.bases.builder import BasisBuilder
from raytvb.experiment.config import Experiment
from raytvb.experiment.parsing import parse_experiment
from raytvb.finetuning.finetune_task import finetune_task
from raytvb.finetuning.masks import commit_shared_mask, score_task, select_round
from raytvb.finetuning.twins import make_twin
from raytvb.models.pretrained_model import store_base
from raytvb.models.pretrained_task import prepare_task
from raytvb.storage.store import Store

METHODS = ("size", "read", "read_range", "write", "keys", "delete", "download")
TASKS = ("glyphs/greek-blur", "glyphs/latin-fog", "glyphs/clock-blur")


class Requests:
    """Requests since the last `clear`, as (method, key)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: Counter[tuple[str, str]] = Counter()
        self._inside = False
        for method in METHODS:
            monkeypatch.setattr(Store, method, self._counted(method, getattr(Store, method)))

    def _counted(self, method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(store: Store, *arguments: Any) -> Any:
            if self._inside:  # a method that calls other methods counts once
                return original(store, *arguments)
            self.made[method, str(arguments[0]) if arguments else ""] += 1
            self._inside = True
            try:
                return original(store, *arguments)
            finally:
                self._inside = False

        return call

    def clear(self) -> None:
        self.made.clear()

    @property
    def total(self) -> int:
        return sum(self.made.values())

    def reads_of(self, key: str) -> int:
        return sum(n for (method, k), n in self.made.items() if k == key and method != "write")


@pytest.fixture
def requests(suite_cache: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Requests]:
    monkeypatch.setenv("RAYTVB_CACHE", suite_cache)
    yield Requests(monkeypatch)


def started(folder: Path, **basis: Any) -> tuple[Experiment, str]:
    """An experiment whose model, heads and shared mask are stored; the model's fingerprint."""
    experiment = parse_experiment(
        {
            "store": str(folder),
            "tasks": list(TASKS),
            "talos": {"images": 16, "rounds": 1},
            "finetune": {"epochs": 1, "batch_size": 256},
            "basis": {"method": ["svd"], **basis},
            "search": {"sizes": [1]},
        }
    )
    fingerprint = store_base(experiment).parents["fingerprint"]
    for task in experiment.tasks:
        prepare_task(experiment, fingerprint, task, ())
    scores = score_task(experiment, fingerprint, experiment.tasks[0], 1, None)
    commit_shared_mask(experiment, fingerprint, select_round(experiment, scores, None, 1))
    return experiment, fingerprint


@pytest.mark.parametrize(
    ("prepare", "tune", "add", "again"), [("none", 15, 9, 3), ("trimmed", 26, 10, 4)]
)
def test_a_vector_passes_each_room_once(
    tmp_path: Path, requests: Requests, prepare: str, tune: int, add: int, again: int
) -> None:
    """A second look-up of a record, or of a file that is open already, would show here."""
    experiment, fingerprint = started(tmp_path, prepare=prepare)
    builder = BasisBuilder(experiment)
    for task in experiment.tasks[
        :2
    ]:  # the first vector also opens the files that are opened only once
        record = f"vectors/{task.name}/record.json"
        requests.clear()
        finetune_task(experiment, fingerprint, task)
        assert requests.total <= tune
        # Before training and before the commit: another may be at work.
        assert requests.reads_of(record) == 2
        requests.clear()
        assert not builder.add([task.name]).failed
        assert requests.reads_of(record) == 1
    assert requests.total <= add
    requests.clear()
    finetune_task(experiment, fingerprint, task)
    assert requests.total <= again
    requests.clear()
    assert builder.add([task.name]).vectors == 2
    assert requests.total == requests.reads_of(record) + requests.reads_of(
        f"prepared/{task.name}/record.json"
    )


def test_a_twin_that_is_not_asked_for_costs_no_request(tmp_path: Path, requests: Requests) -> None:
    experiment, _ = started(tmp_path)
    requests.clear()
    make_twin(experiment, experiment.tasks[0])
    assert requests.total == 0
