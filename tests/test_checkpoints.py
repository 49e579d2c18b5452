"""Checkpoints of fine-tunes in the store, and the keys and records of a task in its `TaskStore`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vector_files import flip

from raytvb.experiment.identities import twin_identity, vector_identity
from raytvb.experiment.layout import (
    MASK,
    basis_vector_prefix,
    checkpoint_prefix,
    head_prefix,
    mask_prefix,
    vector_prefix,
)
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.shared_masks import find_shared_mask
from raytvb.experiment.stored_vectors import find_basis_vector
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.checkpoints import CheckpointFolder
from raytvb.finetuning.training_loop import Checkpoint
from raytvb.storage import records
from raytvb.storage.records import Record
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


@pytest.mark.parametrize(
    "fields",
    [
        {"finetune": {"lr": 0.25}},
        {"seed": 1},
        {"tasks": [*task_names()[:1], {"name": task_names()[1], "epochs": 3}]},
    ],
)
def test_a_checkpoint_of_other_settings_is_none(tmp_path: Path, fields: dict[str, Any]) -> None:
    """The training begins anew, and its first checkpoint takes the place of the other one."""
    CheckpointFolder(task_store(tmp_path)).save(checkpoint(3))
    other = CheckpointFolder(task_store(tmp_path, **fields))
    assert other.load() is None and other.latest is None
    assert same(CheckpointFolder(task_store(tmp_path)).load(), checkpoint(3))
    other.save(checkpoint(1))
    assert same(CheckpointFolder(task_store(tmp_path, **fields)).load(), checkpoint(1))
    assert CheckpointFolder(task_store(tmp_path)).load() is None


def test_a_checkpoint_does_not_depend_on_where_a_setting_is_given(tmp_path: Path) -> None:
    tasks = [*task_names()[:1], {"name": task_names()[1], "lr": 0.25, "seed": 4}]
    CheckpointFolder(task_store(tmp_path, tasks=tasks)).save(checkpoint(3))
    mixed = [*task_names()[:1], {"name": task_names()[1], "seed": 4}]
    same_settings: list[dict[str, Any]] = [
        {"finetune": {"lr": 0.25}, "seed": 4},
        {"finetune": {"lr": 0.25}, "seed": 9, "tasks": mixed},
    ]
    for fields in same_settings:
        assert same(CheckpointFolder(task_store(tmp_path, **fields)).load(), checkpoint(3))


def commit_shared_mask(one: TaskStore, mask_id: str, fingerprint: str) -> None:
    records.commit(
        one.store,
        mask_prefix(mask_id),
        identity=one.mask_identity,
        files={MASK: fingerprint.encode()},
        parents={"mask": fingerprint},
    )


def test_a_checkpoint_on_an_older_shared_mask_is_none(tmp_path: Path) -> None:
    one = task_store(tmp_path)
    commit_shared_mask(one, "shared", "first")
    CheckpointFolder(one).save(checkpoint(3))
    assert same(CheckpointFolder(task_store(tmp_path)).load(), checkpoint(3))
    commit_shared_mask(one, "shared-2", "second")
    other = task_store(tmp_path)
    assert CheckpointFolder(other).load() is None
    CheckpointFolder(other).save(checkpoint(4))
    assert same(CheckpointFolder(other).load(), checkpoint(4))


def test_a_checkpoint_of_an_earlier_format_names_no_mask(tmp_path: Path) -> None:
    """Such a store has had only one mask."""
    one = task_store(tmp_path)
    CheckpointFolder(one).save(checkpoint(3))  # without a mask in its identity
    commit_shared_mask(one, "shared", "first")
    assert same(CheckpointFolder(task_store(tmp_path)).load(), checkpoint(3))


@pytest.mark.parametrize("prepare", ["none", "trimmed"])
def test_what_is_carried_is_what_the_layout_and_the_identities_say(
    tmp_path: Path, prepare: str
) -> None:
    one = task_store(tmp_path, basis={"prepare": prepare})
    experiment, task = one.experiment, one.task
    assert one.identity == vector_identity(experiment, task) and one.identity is one.identity
    assert one.twin_identity == twin_identity(experiment, task)
    assert one.prefix == vector_prefix(task.name)
    assert one.head_prefix == head_prefix(task.name)
    assert one.checkpoint_prefix == checkpoint_prefix(task.name)
    assert one.own_mask_prefix == mask_prefix(task.name)
    assert one.basis_vector_prefix == basis_vector_prefix(experiment, task.name)
    assert one.has_twin == (prepare != "none")


@pytest.mark.parametrize(
    ("talos", "shares", "own"),
    [
        ({"density": 1.0}, False, False),
        ({"density": 1.0, "mask": "per-task"}, False, False),
        ({"mask": "shared"}, True, False),
        ({"mask": "per-task"}, False, True),
    ],
)
def test_the_mask_is_none_or_the_shared_one_or_the_tasks_own(
    tmp_path: Path, talos: dict[str, Any], shares: bool, own: bool
) -> None:
    one = task_store(tmp_path, talos=talos)
    experiment = one.experiment
    assert (experiment.shares_mask, experiment.own_masks) == (shares, own)
    assert one.shared_mask is None
    commit_shared_mask(one, "shared", "bits")
    mask = TaskStore(experiment, one.task).shared_mask
    assert (mask is not None) == shares
    if mask is not None:
        assert mask == find_shared_mask(one.store, experiment) and mask.fingerprint == "bits"
        assert mask.key == f"masks/shared/{MASK}" and mask.scored == (task_names()[1],)


def test_the_twin_of_another_version_does_not_count(tmp_path: Path) -> None:
    one = task_store(tmp_path, basis={"prepare": "trimmed"})
    name = one.task.name

    def basis_vector() -> Record | None:
        found = find_basis_vector(one.experiment, name)
        return None if found is None else found.record

    assert one.record() is None and one.vector() is None and basis_vector() is None
    for content in (b"first", b"second"):
        vector = records.commit(
            one.store, one.prefix, identity=one.identity, files={"vector.safetensors": content}
        )
        stored = one.vector()
        assert stored is not None and stored.record == one.record() == vector
        assert basis_vector() is None
        before = one.twin()
        assert before is None or not one.is_twin(before, stored)
        twin = records.commit(
            one.store,
            one.basis_vector_prefix,
            identity=one.twin_identity,
            files={"vector.safetensors": content},
            parents={"vector": vector.files["vector.safetensors"].sha256},
        )
        assert basis_vector() == twin == one.twin() and one.is_twin(twin, stored)
