"""A small store that is filled without Ray: masks of the tasks' own, prepared twins, online bases,
a checkpoint, decoded images and rows of evaluations. The stages of a run call the same functions.
"""

from __future__ import annotations

from pathlib import Path

import torch

from raytvb.bases.builder import BasisBuilder
from raytvb.data.split_cache import cached_split
from raytvb.evaluation.rows import PairRow, Row, write_pair_rows, write_rows
from raytvb.experiment.config import Experiment
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.present_experiments import record_experiment
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.checkpoints import CheckpointFolder
from raytvb.finetuning.finetune_task import finetune_task
from raytvb.finetuning.masks import record_overlap
from raytvb.finetuning.training_loop import Checkpoint
from raytvb.models.pretrained_model import load_base, store_base
from raytvb.report.timings import add_timing
from raytvb.storage.gram_state import GramState, GramWriter
from raytvb.storage.store import Store

TASKS = ("glyphs/greek-blur", "glyphs/latin-fog", "glyphs/clock-blur")
UNFINISHED = "glyphs/greek-fog"
"""A task that has a checkpoint, and no vector yet."""

ONLINE = "svd-m1-online"


def small_experiment(store: str) -> Experiment:
    return parse_experiment(
        {
            "store": store,
            "tasks": [*TASKS, UNFINISHED],
            "talos": {"mask": "per-task", "images": 16, "rounds": 1},
            "finetune": {"epochs": 1, "batch_size": 256},
            "basis": {"method": ["svd"], "online": True, "prepare": "trimmed"},
            "search": {"sizes": [1]},
        }
    )


def fill(url: str) -> Experiment:
    """Fill the store, and return its experiment."""
    whole, store = small_experiment(url), Store(url)
    experiment = finished_part(whole)
    record_experiment(store, whole, grows=True)
    fingerprint = store_base(experiment).parents["fingerprint"]
    for task in experiment.tasks:
        finetune_task(experiment, fingerprint, task)
    record_overlap(experiment)
    make_bases(experiment)
    store.delete(f"online/{ONLINE}")  # its vectors now lie beside those of the finished basis
    make_bases(experiment)
    _with_gram_rows(experiment)
    preprocess = load_base(url, fingerprint).preprocess
    cached_split(store, experiment.tasks[0], "val", preprocess)
    row = Row("full", "test", 1, 0, TASKS[0], 0.5, 10, 20)
    pair = PairRow("full", "test", TASKS[0], TASKS[1], 0.5, 0.5, 1, 20, 0.1)
    write_rows(store, "full", [row], {})
    write_pair_rows(store, "disentanglement", [pair], {})
    add_timing(store, "finetune", 1.5)
    folder = CheckpointFolder(TaskStore(whole, whole.tasks[-1]))
    tensors = {"values": torch.arange(5.0), "rng": torch.get_rng_state()}
    folder.save(Checkpoint(3, 0.5, 1.5, tensors))
    return whole


def finished_part(experiment: Experiment) -> Experiment:
    """The experiment without the task that has no vector."""
    return experiment.restricted(set(TASKS))


def _with_gram_rows(experiment: Experiment) -> None:
    """Leave the later vectors out of the snapshot, so that the second one has a file of rows."""
    store = Store(experiment.store)
    state = GramState.read(store)
    state.forget(experiment.task_names[1:])
    GramWriter(store).save(state)
    BasisBuilder(experiment).add(experiment.task_names[:2])
    assert store.keys("gram/rows")


def make_bases(experiment: Experiment) -> None:
    """What the basis actor does in a run."""
    builder = BasisBuilder(finished_part(experiment))
    assert not builder.add(TASKS).failed
    builder.write_bases()


def copied(url: str, folder: Path) -> Store:
    """A copy of a local store, which a test may damage."""
    source, copy = Store(url), Store(str(folder))
    for key in source.keys():
        source.download(key, copy.path(key))
    return copy
