"""Things that are written again: wherever a writer dies, the old or the new one is whole."""

from __future__ import annotations

import io
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from raytvb.data.load_split import load_split
from raytvb.data.preprocess import Preprocess
from raytvb.data.split_cache import cached_split
from raytvb.errors import VectorError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import vector_prefix
from raytvb.experiment.parsing import load_experiment
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.stored_vectors import find_basis_vector
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.checkpoints import CheckpointFolder
from raytvb.finetuning.training_loop import Checkpoint
from raytvb.finetuning.twins import make_twin, twin_values
from raytvb.storage import records
from raytvb.storage.records import RECORD
from raytvb.storage.replacing import commit_over, delete_thing, new_tag, tagged
from raytvb.storage.store import Store
from raytvb.storage.vectors import VECTOR, vector_bytes

ARCHIVE = Path(__file__).parent / "stores" / "format-1.tar.xz"


class KilledError(BaseException):
    """Ends a writer as a kill does: nothing catches it."""


class Deaths:
    """Counts the changes of all stores. After some of them, the writer dies."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        """How many changes are left before the death; None: the writer lives."""
        for name in ("write", "delete"):
            patch.setattr(Store, name, self._counted(getattr(Store, name)))

    def _counted(self, plain: Any) -> Any:
        def change(store: Store, *args: Any) -> None:
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise KilledError
            plain(store, *args)

        return change


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> Deaths:
    """The counter of changes, which begins to count when a test sets `left`."""
    return Deaths(monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(str(tmp_path / "store"))


# The switch ---------------------------------------------------------------------------------------


def test_new_files_never_have_the_names_of_old_ones(store: Store) -> None:
    assert new_tag(store, "thing", b"1") == "" and tagged("a.json", "") == "a.json"
    records.commit(store, "thing", identity={}, files={"a.json": b"1"})
    tag = new_tag(store, "thing", b"1")
    assert len(tag) == 8 and tag == new_tag(store, "thing", b"1") != new_tag(store, "thing", b"2")
    assert tagged("basis.safetensors.index.json", tag) == f"basis-{tag}.safetensors.index.json"
    commit_over(store, "thing", identity={"other": 1}, files={tagged("a.json", tag): b"2"})
    assert store.keys("thing") == [f"thing/a-{tag}.json", f"thing/{RECORD}"]
    assert tag not in new_tag(store, "thing", b"1")
    store.write(f"thing/{RECORD}", b"no record")
    assert new_tag(store, "thing", b"1") == ""
    commit_over(store, "thing", identity={}, files={"a.json": b"3"})
    record = records.find(store, "thing")
    assert record is not None and list(record.files) == ["a.json"]


def test_a_thing_is_whole_at_every_change(store: Store, deaths: Deaths) -> None:
    names = ("a", "b", "c")
    records.commit(store, "thing", identity={}, files={name: b"old" for name in names})
    steps = 0
    while True:
        deaths.left = steps
        try:
            tag = new_tag(store, "thing", b"new")
            files = {tagged(name, tag): b"new" for name in names}
            commit_over(store, "thing", identity={}, files=files)
            break
        except KilledError:
            steps += 1
        finally:
            deaths.left = None
        record = records.find(store, "thing")
        assert record is not None and len(record.files) == 3
        values = {records.read_file(store, "thing", name, record) for name in record.files}
        assert len(values) == 1
        if values == {b"new"}:  # only the old files are left to be deleted
            break
    assert steps >= 4


def test_a_thing_is_never_left_without_its_files(store: Store, deaths: Deaths) -> None:
    for left in range(6):
        for name in ("one", "one/two"):
            records.commit(store, name, identity={}, files={"a": b"1", "b": b"2"})
        deaths.left = left
        with suppress(KilledError):
            delete_thing(store, "one")
        deaths.left = None
        for prefix, record in records.find_all(store).items():
            assert {f"{prefix}/{name}" for name in record.files} <= set(store.keys(prefix))
    assert store.keys() == []


# Splits -------------------------------------------------------------------------------------------

CONFIG = {
    "size": (16, 16),
    "mode": "RGB",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "resize_mode": "squash",
}
PREPROCESS = Preprocess(16, (0.5,) * 3, (0.5,) * 3, CONFIG)


def images_in(folder: Path, seed: int, count: int) -> TaskConfig:
    """A task of its own data set with `count` validation images."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
        rows.append(buffer.getvalue())
    folder.mkdir()
    table = pa.table({"image": rows, "label": rng.integers(0, 2, count)})
    pq.write_table(table, folder / "val.parquet")
    fields = {"name": "own/set", "data": str(folder), "classes": ["a", "b"]}
    return TaskConfig.model_validate(fields)


def test_a_decoded_split_is_kept_until_the_next_one_is_whole(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: Deaths
) -> None:
    """Another task takes the name of the first, whose data set is gone meanwhile."""
    monkeypatch.setattr("raytvb.data.split_cache._FILE_BYTES", 3 * 3 * 16 * 16)
    first = images_in(tmp_path / "first", 1, 10)
    second = images_in(tmp_path / "second", 2, 7)
    old, new = (load_split(task, "val", PREPROCESS) for task in (first, second))
    cached_split(store, first, "val", PREPROCESS)
    before = {key: store.read(key) for key in store.keys()}
    shutil.rmtree(tmp_path / "first")
    kept = changes = 0
    for left in range(40):
        deaths.left = left
        try:
            cached_split(store, second, "val", PREPROCESS)
            changes = left
        except KilledError:
            pass
        deaths.left = None
        if changes:
            break
        record = store.read(f"splits/val/own/set/{RECORD}")
        if record == before[f"splits/val/own/set/{RECORD}"]:
            kept += 1
            again = cached_split(store, first, "val", PREPROCESS)
            assert torch.equal(again.images, old.images) and torch.equal(again.labels, old.labels)
    assert kept >= 5
    shutil.rmtree(tmp_path / "second")
    found = cached_split(store, second, "val", PREPROCESS)
    assert torch.equal(found.images, new.images) and torch.equal(found.labels, new.labels)


# Twins and checkpoints ----------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Experiment:
    """A finished experiment with masks of its tasks' own and prepared twins."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "format-1"
    return load_experiment(folder / "own.yaml", {"store": str(folder / "own")})


def train_again(experiment: Experiment, factor: float) -> TaskStore:
    """Store the first task's vector times a factor, as if it had been trained again."""
    task_store = TaskStore(experiment, experiment.tasks[0])
    store, vector = task_store.store, task_store.vector()
    assert vector is not None and task_store.record() == vector.record
    values = {name: factor * tensor for name, tensor in load_file(store.path(vector.key)).items()}
    data = vector_bytes(values, vector.open().info)
    commit_over(
        store,
        task_store.prefix,
        identity=vector.record.identity,
        files={tagged(VECTOR, new_tag(store, task_store.prefix, data)): data},
        parents=vector.record.parents,
    )
    return task_store


def test_a_twin_is_made_again_whatever_step_its_writer_died_at(
    own: Experiment, deaths: Deaths
) -> None:
    task_store = train_again(own, -2.0)
    store, died = task_store.store, 0
    name, prefix = task_store.task.name, task_store.basis_vector_prefix
    before = records.find(store, prefix)
    assert before is not None
    for left in range(10):
        deaths.left = left
        try:
            make_twin(own, own.tasks[0])
            break
        except KilledError:
            died += 1
        finally:
            deaths.left = None
        record, found = records.find(store, prefix), find_basis_vector(own, name)
        assert record is not None and set(record.files) <= set(names_in(store, prefix))
        # Nothing takes the old twin for the new one, and bases on the old one are still whole.
        assert (record == before) == (found is None)
    assert died == 3  # at the new file, the record, and the old file
    twin, vector = find_basis_vector(own, name), task_store.vector()
    assert twin is not None and vector is not None
    expected = torch.cat([v.reshape(-1) for v in twin_values(vector.open(), "trimmed", 0).values()])
    file = twin.open()
    assert torch.equal(file.values(0, file.stored), expected)


def names_in(store: Store, prefix: str) -> list[str]:
    return [key.removeprefix(f"{prefix}/") for key in store.keys(prefix)]


def test_a_twin_that_would_not_be_finite_is_refused_by_name(own: Experiment) -> None:
    """`dropped` scales what it keeps up by 10."""
    basis = own.basis.model_copy(update={"prepare": "dropped"})
    asked = own.model_copy(update={"basis": basis})
    store = Store(own.store)
    values = torch.cat([t.reshape(-1) for t in load_file(own_vector(own)).values()])
    train_again(own, 3e38 / float(values.abs().max()))
    store.delete("prepared")
    with pytest.raises(VectorError, match=r"would have NaN or infinite values in visual\."):
        make_twin(asked, asked.tasks[0])
    assert store.keys("prepared") == []


def own_vector(experiment: Experiment) -> str:
    return Store(experiment.store).path(f"{vector_prefix(experiment.task_names[0])}/{VECTOR}")


def state(step: int) -> Checkpoint:
    """A checkpoint that shows its step in its values."""
    tensors = {"values": torch.full((3,), float(step)), "rng": torch.get_rng_state()}
    return Checkpoint(step, 0.5, 1.0, tensors)


def test_a_checkpoint_is_whole_at_every_change(own: Experiment, deaths: Deaths) -> None:
    task_store = TaskStore(own, own.tasks[0])
    steps = []
    for left in range(4):
        folder = CheckpointFolder(task_store)
        folder.delete()
        folder.save(state(1))
        deaths.left = left
        with suppress(KilledError):
            folder.save(state(2))
        deaths.left = None
        loaded = CheckpointFolder(task_store).load()
        assert loaded is not None and bool((loaded.tensors["values"] == loaded.step).all())
        steps.append(loaded.step)
    assert steps == [1, 1, 2, 2]
