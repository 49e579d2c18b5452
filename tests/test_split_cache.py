"""Images and heads, made once for an experiment and kept in its store. They are made again if they
are damaged or belong to something else.
"""

import io
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from vector_files import flip, problems_of, truncate

from raytvb.data.load_split import load_split
from raytvb.data.preprocess import Preprocess
from raytvb.data.split_cache import cached_split, split_prefix
from raytvb.data.splits import Split
from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import HEAD, head_prefix
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.task_store import TaskStore
from raytvb.models.heads import load_head, load_tokenizer, write_head, zero_shot_head
from raytvb.models.open_clip_models import Encoder, load_encoder
from raytvb.storage.store import Store
from raytvb.suite.task_names import class_names, task_names

CONFIG = {
    "size": (16, 16),
    "mode": "RGB",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "resize_mode": "squash",
}
PREPROCESS = Preprocess(16, (0.5,) * 3, (0.5,) * 3, CONFIG)
COUNT = 11


def write_data(folder: Path, seed: int = 0, count: int = COUNT) -> Path:
    """Splits val and test with `count` images each, of three classes. The second image of each
    split cannot be read.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("val", "test"):
        images = []
        for _ in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
            images.append(buffer.getvalue())
        images[1] = b"no image"
        pq.write_table(
            pa.table({"image": images, "label": rng.integers(0, 3, count)}),
            folder / f"{split}.parquet",
        )
    return folder


def task_of(data: Path, **fields: Any) -> TaskConfig:
    return TaskConfig.model_validate(
        {"name": "own/set", "data": str(data), "classes": ["a", "b c", "é"], **fields}
    )


def same(left: Split, right: Split) -> bool:
    return (
        torch.equal(left.images, right.images)
        and torch.equal(left.labels, right.labels)
        and left.images.dtype == right.images.dtype
        and left.labels.dtype == right.labels.dtype
        and (left.classes, left.skipped) == (right.classes, right.skipped)
    )


def test_a_split_is_decoded_once_and_then_comes_from_the_store(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "raytvb.data.split_cache._FILE_BYTES", 4 * 3 * 16 * 16
    )  # ten images: files of 4, 4 and 2
    task, store = task_of(write_data(tmp_path / "data")), Store(store_url)
    expected = {s: load_split(task, s, PREPROCESS) for s in ("val", "test")}
    assert (
        expected["val"].skipped == 1
        and len(expected["val"]) == COUNT - 1
        and not same(*expected.values())
    )
    for split in ("val", "test"):
        assert same(cached_split(store, task, split, PREPROCESS), expected[split])
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError):
        load_split(task, "val", PREPROCESS)
    for split in ("val", "test"):
        found = cached_split(Store(store_url), task, split, PREPROCESS)
        assert same(found, expected[split]) and len(found) == COUNT - 1
    names = [f"images-0000{k}-of-00003.safetensors" for k in (1, 2, 3)] + [
        "labels.safetensors",
        "record.json",
    ]
    assert store.keys() == [f"splits/{s}/own/set/{n}" for s in ("test", "val") for n in names]
    assert problems_of(store) == []
    sizes = [
        load(store.read(f"{split_prefix('own/set', 'val')}/{n}"))["images"].shape for n in names[:3]
    ]
    assert sizes == [(4, 3, 16, 16), (4, 3, 16, 16), (2, 3, 16, 16)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def test_an_image_larger_than_a_file_is_a_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytvb.data.split_cache._FILE_BYTES", 100)
    task = task_of(write_data(tmp_path / "data"))
    expected = cached_split(store, task, "val", PREPROCESS)
    assert len(store.keys("splits")) == COUNT - 1 + 2
    assert same(cached_split(store, task, "val", PREPROCESS), expected)


SOMETHING_ELSE = [
    ({"classes": ["a", "b", "c", "d"]}, {}),
    ({"max_corrupt": 1}, {}),
    ({"splits": {"val": "test", "test": "val"}}, {}),
    ({}, {**CONFIG, "mean": (0.4, 0.5, 0.5)}),
    ({}, {**CONFIG, "resize_mode": "shortest"}),
]


@pytest.mark.parametrize(("fields", "config"), SOMETHING_ELSE)
def test_a_split_of_something_else_is_made_again(
    store: Store, tmp_path: Path, fields: dict[str, Any], config: Mapping[str, Any]
) -> None:
    data = write_data(tmp_path / "data")
    task, preprocess = task_of(data), PREPROCESS
    first = cached_split(store, task, "val", preprocess)
    write_data(data, seed=1)
    assert same(cached_split(store, task, "val", preprocess), first)
    other = task_of(data, **fields), replace(preprocess, config=config or CONFIG)
    again = cached_split(store, other[0], "val", other[1])
    assert same(again, load_split(other[0], "val", other[1])) and not same(again, first)
    assert not same(cached_split(store, task, "val", preprocess), first)  # and once more


def test_other_data_is_another_split(store: Store, tmp_path: Path) -> None:
    left, right = (
        task_of(write_data(tmp_path / n, seed=k)) for k, n in enumerate(("left", "right"))
    )
    assert not same(
        cached_split(store, left, "val", PREPROCESS), cached_split(store, right, "val", PREPROCESS)
    )
    assert same(cached_split(store, right, "val", PREPROCESS), load_split(right, "val", PREPROCESS))


def test_what_images_do_not_depend_on_changes_nothing(store: Store, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    first = cached_split(store, task_of(data), "val", PREPROCESS)
    shutil.rmtree(data)
    other = task_of(data, epochs=3, templates=["a {} of another kind."])
    assert same(cached_split(store, other, "val", PREPROCESS, threads=3), first)


def rewrite(store: Store, key: str) -> None:
    """A whole file with other images."""
    store.write(key, save({"images": 255 - load(store.read(key))["images"]}))


def swap(store: Store, key: str) -> None:
    """The bytes of another file of the same size."""
    store.write(key, store.read(key.replace("00001-of", "00002-of")))


DAMAGE: dict[str, tuple[str, Callable[[Store, str], Any]]] = {
    "missing": ("images-00001-of-00002.safetensors", lambda store, key: store.delete(key)),
    "second missing": ("images-00002-of-00002.safetensors", lambda store, key: store.delete(key)),
    "no labels": ("labels.safetensors", lambda store, key: store.delete(key)),
    "no record": ("record.json", lambda store, key: store.delete(key)),
    "bit of an image": (
        "images-00002-of-00002.safetensors",
        lambda store, key: flip(store, key, -9),
    ),
    "bit of the header": (
        "images-00001-of-00002.safetensors",
        lambda store, key: flip(store, key, 3),
    ),
    "bit of a label": ("labels.safetensors", lambda store, key: flip(store, key, -1)),
    "cut off": ("images-00001-of-00002.safetensors", lambda store, key: truncate(store, key, -1)),
    "empty": ("labels.safetensors", lambda store, key: truncate(store, key, 0)),
    "other images": ("images-00001-of-00002.safetensors", rewrite),
    "swapped": ("images-00001-of-00002.safetensors", swap),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_made_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("raytvb.data.split_cache._FILE_BYTES", 5 * 3 * 16 * 16)
    task = task_of(write_data(tmp_path / "data"))
    expected = cached_split(store, task, "val", PREPROCESS)
    files = store.keys()
    assert len(files) == 4
    name, damage = DAMAGE[kind]
    damage(store, f"{split_prefix(task.name, 'val')}/{name}")
    assert same(cached_split(store, task, "val", PREPROCESS), expected)
    assert store.keys() == files and problems_of(store) == []
    shutil.rmtree(tmp_path / "data")
    assert same(cached_split(store, task, "val", PREPROCESS), expected)


def test_files_of_a_longer_split_are_gone(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytvb.data.split_cache._FILE_BYTES", 5 * 3 * 16 * 16)
    data = write_data(tmp_path / "data", count=26)
    cached_split(store, task_of(data), "val", PREPROCESS)
    cached_split(store, task_of(data), "test", PREPROCESS)
    assert len(store.keys("splits/val")) == len(store.keys("splits/test")) == 5 + 2
    write_data(data, count=6)
    cached_split(store, task_of(data, max_corrupt=3), "val", PREPROCESS)
    assert len(store.keys("splits/val")) == 1 + 2 and len(store.keys("splits/test")) == 5 + 2


def test_data_that_cannot_be_read_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    task = task_of(write_data(tmp_path / "data"), max_corrupt=0)
    with pytest.raises(UserError, match="row 1 is not a readable image"):
        cached_split(store, task, "val", PREPROCESS)
    with pytest.raises(UserError, match="no train split"):
        cached_split(store, task, "train", PREPROCESS)
    assert store.keys() == []


# Heads --------------------------------------------------------------------------------------------

NAMES = task_names()
CONTROL, UNSEEN = NAMES[5], NAMES[6]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(asked("/nowhere").model)


def asked(store: str, **fields: Any) -> Experiment:
    return parse_experiment({"store": store, "tasks": list(NAMES[:2]), **fields})


def templates(name: str) -> dict[str, Any]:
    return {"name": name, "templates": ["only {} here."]}


def head_key(task: TaskConfig) -> str:
    return f"{head_prefix(task.name)}/{HEAD}"


def head_of(encoder: Encoder, made: Experiment, task: TaskConfig) -> torch.Tensor:
    classes = task.classes or class_names(task.name)
    return zero_shot_head(encoder, load_tokenizer(made.model), classes, task.prompts)


def test_a_head_is_made_once_and_again_where_it_is_of_other_prompts_or_classes(
    store: Store, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [
        {"control": CONTROL},
        {"control": templates(CONTROL)},
        {"control": CONTROL, "unseen": [UNSEEN]},
        {"control": "none", "unseen": {"tasks": [templates(UNSEEN)]}},
        {
            "control": {
                "name": CONTROL,
                "classes": [f"thing {k}" for k in range(len(class_names(CONTROL)))],
            }
        },
    ]
    made_anew: list[str] = []
    real = write_head

    def counted(*arguments: Any) -> Any:
        made_anew.append(arguments[0].task.name)
        return real(*arguments)

    monkeypatch.setattr("raytvb.models.heads.write_head", counted)
    for evaluate in kinds:
        made = asked(store.url, evaluate=evaluate)
        for task in made.every_task:
            expected = head_of(encoder, made, task)
            for _ in range(2):
                torch.testing.assert_close(
                    load_head(TaskStore(made, task), encoder).weights, expected
                )
                assert torch.equal(
                    load(store.read(head_key(task)))["head"],
                    load_head(TaskStore(made, task), encoder).weights,
                )
    assert made_anew == [*NAMES[:2], CONTROL, CONTROL, CONTROL, UNSEEN, UNSEEN, CONTROL]


def other_values(store: Store, key: str) -> None:
    store.write(key, save({"head": torch.zeros(2, 3)}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda store, key: store.delete(key),
        other_values,
        lambda store, key: truncate(store, key, -1),
        lambda store, key: truncate(store, key, 0),
        lambda store, key: store.write(key, b"no safetensors"),
    ],
)
def test_a_head_that_is_not_there_or_not_whole_is_made_again(
    store: Store, encoder: Encoder, damage: Callable[[Store, str], Any]
) -> None:
    made = asked(store.url, evaluate={"control": templates(CONTROL)})
    for task in (made.tasks[0], made.evaluate.control):
        assert task is not None
        first = load_head(TaskStore(made, task), encoder).weights
        key = head_key(task)
        data = store.read(key)
        damage(store, key)
        assert (
            torch.equal(load_head(TaskStore(made, task), encoder).weights, first)
            and store.read(key) == data
        )
