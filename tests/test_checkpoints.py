"""Checkpoints of fine-tunes in the store, and the keys and records of a task in its `TaskStore`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vector_files import flip

from raytvb.errors import UserError
from raytvb.experiment.identities import twin_identity, vector_identity
from raytvb.experiment.layout import (
    basis_vector_key,
    checkpoint_prefix,
    head_prefix,
    vector_key,
    vector_prefix,
)
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.task_store import TaskStore, task_stores
from raytvb.finetuning.checkpoints import CheckpointFolder
from raytvb.finetuning.training_loop import Checkpoint
from raytvb.storage import records
from raytvb.suite.task_names import task_names


def task_store(folder: Path, index: int = 1, **fields: Any) -> TaskStore:
    tasks = list(task_names()[:3])
    experiment = parse_experiment({"store": str(folder), "tasks": tasks, **fields})
    return TaskStore(experiment, experiment.tasks[index])


def checkpoint(step: int) -> Checkpoint:
    tensors = {"values": torch.full((4,), float(step)), "rng": torch.get_rng_state()}
    return Checkpoint(step, 0.5 / step, 2.0 * step, tensors)


def same(left: Checkpoint | None, right: Checkpoint) -> bool:
    assert left is not None
    numbers = (left.step, left.loss, left.seconds) == (right.step, right.loss, right.seconds)
    return numbers and torch.equal(left.tensors["values"], right.tensors["values"])


def test_the_latest_checkpoint_is_kept_and_comes_back(tmp_path: Path) -> None:
    folder = CheckpointFolder(task_store(tmp_path))
    assert folder.load() is None and folder.latest is None
    for step in (1, 7):
        folder.save(checkpoint(step))
        assert folder.latest == step
    again = CheckpointFolder(task_store(tmp_path))
    assert same(again.load(), checkpoint(7)) and again.latest == 7
    assert len(task_store(tmp_path).store.keys()) == 2  # one checkpoint and its record
    again.delete()
    assert again.load() is None and task_store(tmp_path).store.keys() == []


def test_a_checkpoint_that_is_not_whole_is_none(tmp_path: Path) -> None:
    folder, store = CheckpointFolder(task_store(tmp_path)), task_store(tmp_path).store
    folder.save(checkpoint(3))
    (key,) = (key for key in store.keys() if key.endswith("safetensors"))
    flip(store, key, -1)
    assert folder.load() is None
    store.delete(key)
    assert folder.load() is None


def test_a_checkpoint_of_other_settings_is_an_error(tmp_path: Path) -> None:
    CheckpointFolder(task_store(tmp_path)).save(checkpoint(3))
    with pytest.raises(UserError, match=r"finetune\.lr: stored .*, asked for 0\.25"):
        CheckpointFolder(task_store(tmp_path, finetune={"lr": 0.25})).load()


@pytest.mark.parametrize("prepare", ["none", "trimmed"])
def test_what_is_carried_is_what_the_layout_and_the_identities_say(
    tmp_path: Path, prepare: str
) -> None:
    one = task_store(tmp_path, basis={"prepare": prepare})
    experiment, task = one.experiment, one.task
    assert one.identity == vector_identity(experiment, task) and one.identity is one.identity
    assert one.twin_identity == twin_identity(experiment, task)
    assert one.prefix == vector_prefix(task.name) and one.vector_key == vector_key(task.name)
    assert one.head_prefix == head_prefix(task.name)
    assert one.checkpoint_prefix == checkpoint_prefix(task.name)
    assert one.basis_vector_key == basis_vector_key(experiment, task.name)
    assert one.has_twin == (prepare != "none")
    assert list(task_stores(experiment)) == list(experiment.task_names)


@pytest.mark.parametrize(
    ("talos", "expected"),
    [
        ({"density": 1.0}, None),
        ({"density": 1.0, "mask": "per-task"}, None),
        ({"mask": "shared"}, "shared"),
        ({"mask": "per-task"}, task_names()[1]),
    ],
)
def test_the_mask_is_none_or_the_shared_one_or_the_tasks_own(
    tmp_path: Path, talos: dict[str, Any], expected: str | None
) -> None:
    assert task_store(tmp_path, talos=talos).mask_id == expected


def test_the_twin_of_another_version_does_not_count(tmp_path: Path) -> None:
    one = task_store(tmp_path, basis={"prepare": "trimmed"})
    assert one.record() is None and one.basis_vector() is None
    for content in (b"first", b"second"):
        vector = records.commit(
            one.store, one.prefix, identity=one.identity, files={"vector.safetensors": content}
        )
        assert one.record() == vector and one.basis_vector() is None
        twin = records.commit(
            one.store,
            one.basis_vector_prefix,
            identity=one.twin_identity,
            files={"vector.safetensors": content},
            parents={"vector": vector.files["vector.safetensors"].sha256},
        )
        assert one.basis_vector() == twin == one.twin_of(vector)
