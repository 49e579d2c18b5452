"""Files of images with labels, good and bad: one line each, through `raytvb plan`."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_data import SQUASH
from test_input_images import encoded, picture
from test_input_plan import TWO, own, plan, write_images

from raytvb.data.load_split import load_split
from raytvb.experiment.sections.tasks import TaskConfig

Make = Callable[[Path], dict[str, Any] | None]
"""Writes files into a folder. Returns the task's fields, None for none."""

CLASSES = ("cat", "dog", "cow")


def table(
    folder: Path,
    name: str,
    labels: Sequence[Any],
    names: Any = CLASSES,
    *,
    images: str = "image",
    column: str = "label",
    given: bytes | None = None,
) -> None:
    """A Parquet file with one image for each label."""
    pictures = []
    for number, label in enumerate(labels):
        seed = int.from_bytes(f"{name}{number}{label}".encode()[-6:], "big")
        pictures.append({"bytes": encoded(picture(seed)), "path": None})
    features = {column: {"names": names, "_type": "ClassLabel"}} if names is not None else {}
    document = given or json.dumps({"info": {"features": features}}).encode()
    arrays = {images: pa.array(pictures), column: pa.array(labels)}
    path = folder / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays).replace_schema_metadata({"huggingface": document}), path)


def tables(*names: str, **fields: Any) -> Make:
    """Parquet files of these names, with one image of each class in each."""

    def make(folder: Path) -> None:
        for name in names:
            table(folder, name, range(3), **fields)

    return make


def one(labels: Sequence[Any], names: Any = CLASSES, **fields: Any) -> Make:
    """One Parquet file with these labels."""

    def make(folder: Path) -> dict[str, Any]:
        table(folder, "train.parquet", labels, names, **fields)
        return {"splits": {"test": 0.4}}

    return make


def both(train: Sequence[str] | Any, test: Sequence[str] | Any, **task: Any) -> Make:
    """Parquet files of train and test, with these class names."""

    def make(folder: Path) -> dict[str, Any]:
        for split, names in (("train", train), ("test", test)):
            size = len(names) if isinstance(names, list | tuple) else 3
            table(folder, f"{split}.parquet", range(size), names)
        return task

    return make


def both_texts(names: Sequence[str], **task: Any) -> Make:
    """Parquet files of train and test whose labels are the names."""

    def make(folder: Path) -> dict[str, Any]:
        for split in ("train", "test"):
            table(folder, f"{split}.parquet", names, names)
        return task

    return make


def trees(counts: dict[str, int], **task: Any) -> Make:
    def make(folder: Path) -> dict[str, Any]:
        write_images(folder / "images", counts)
        return task

    return make


def with_files(make: Make, *names: str, data: bytes = b"x") -> Make:
    """Other files beside the data."""

    def both_made(folder: Path) -> dict[str, Any] | None:
        fields = make(folder)
        for name in names:
            (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "images" / name).write_bytes(data)
        return fields

    return both_made


def with_links(make: Make, **links: str) -> Make:
    """Symbolic links beside the data: their paths, with __ for /, and their targets."""

    def both_made(folder: Path) -> dict[str, Any] | None:
        fields = make(folder)
        for name, target in links.items():
            (folder / "images" / name.replace("__", "/")).symlink_to(target)
        return fields

    return both_made


def columns(**kinds: pa.Array) -> Make:
    def make(folder: Path) -> None:
        (folder / "images").mkdir()
        pq.write_table(pa.table(kinds), folder / "images" / "train.parquet")

    return make


def doubled_column(folder: Path) -> None:
    table(folder, "train.parquet", range(3))
    found = pq.read_table(folder / "images" / "train.parquet")
    arrays = [*found.columns, found.column("label")]
    doubled = pa.Table.from_arrays(arrays, names=["image", "label", "label"])
    pq.write_table(doubled, folder / "images" / "train.parquet")


def elsewhere(data: str, **files: bytes) -> Make:
    """Another `data:` than the folder of images; {folder} is the folder of the test."""

    def make(folder: Path) -> dict[str, Any]:
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)
        return {"data": data.format(folder=folder)}

    return make


BYTES = pa.array([b"x", b"y"])

REFUSED: dict[str, tuple[Make, Sequence[str]]] = {
    # 1. class names that contradict each other
    "other names in test": (
        both(["cat", "dog"], ["cat", "cow"]),
        ("cat, dog", "cat, cow", "data:"),
    ),
    "more names in neither": (
        both(["cat", "dog", "pig"], ["cow", "hen"]),
        ("cow, hen", "cat, dog, pig"),
    ),
    "given names in another order": (
        both(["cat", "dog"], ["cat", "dog"], classes=["dog", "cat"]),
        ("dog, cat", "cat, dog", "order"),
    ),
    "given names moved by one": (
        trees(TWO | {"train/ant": 1}, classes=["cat", "dog", "ant"]),
        ("cat, dog, ant", "ant, cat, dog", "order"),
    ),
    "too few names given": (both(["cat", "dog"], ["cat", "dog"], classes=["a"]), ("`classes`",)),
    "too many names given": (
        both(["cat", "dog"], ["cat", "dog"], classes=["a", "b", "c"]),
        ("3 `classes`", "2 classes"),
    ),
    # 2. files that are missing or there twice
    "the first of two": (tables("train-00001-of-00002.parquet"), ("number 0 is missing", "1 of")),
    "the second of two": (tables("train-00000-of-00002.parquet"), ("number 1 is missing",)),
    "the last of three, counted from one": (
        tables("train-2-of-3.parquet", "train-3-of-3.parquet"),
        ("number 1 is missing",),
    ),
    "nearly all missing": (tables("train-5-of-999999999.parquet"), ("999,999,999",)),
    "one of test": (
        tables("train.parquet", "test-00000-of-00002.parquet"),
        ("test-00000-of-00002.parquet",),
    ),
    "one without a split in its name": (tables("part-0-of-2.parquet"), ("number 1 is missing",)),
    "two counts": (
        tables("train-0-of-1.parquet", "train-0-of-2.parquet", "train-1-of-2.parquet"),
        ("train-0-of-1.parquet", "train-1-of-2.parquet", "twice"),
    ),
    "whole and in parts": (
        tables("train.parquet", "train-0-of-1.parquet"),
        ("train.parquet", "train-0-of-1.parquet"),
    ),
    "a number too high": (
        tables("train-0-of-2.parquet", "train-1-of-2.parquet", "train-7-of-2.parquet"),
        ("train-7-of-2.parquet",),
    ),
    "the same part in two uploads": (
        tables("train-0-of-1-0123456789abcdef.parquet", "train-0-of-1-fedcba9876543210.parquet"),
        ("twice",),
    ),
    "a sample beside all": (tables("train.parquet", "train_small.parquet"), ("twice",)),
    "a file and a folder": (tables("train.parquet", "train/0.parquet"), ("twice",)),
    "two configurations": (tables("a/train.parquet", "b/train.parquet"), ("several folders", "a")),
    "Train and train": (trees(TWO | {"Train/cat": 1}), ("Train", "train")),
    **{
        f"the first of two: {name}": (tables(name), ("number 1 is missing", name))
        for name in (
            "train_00000_of_00002.parquet",
            "train-00000-OF-00002.parquet",
            "train-00000of00002.parquet",
            "train-00000-of-00002.snappy.parquet",
            "train-00000-of-00002-ABCDEF0123.parquet",
            "train-00000-of-00002-part.parquet",
        )
    },
    "files whose names speak of splits": (
        tables("cifar10-train.parquet", "cifar10-test.parquet"),
        ("cifar10-train", "train: cifar10-train, test: cifar10-test"),
    ),
    "folders whose names speak of splits": (
        tables("partial-train/0000.parquet", "partial-test/0000.parquet"),
        ("train: partial-train, test: partial-test",),
    ),
    "split folders with other names": (
        trees({f"{split}_set/{name}": 1 for split in ("training", "test") for name in "ab"}),
        ("train: training_set, test: test_set",),
    ),
    "split folders with other names and classes": (
        trees({"seg_train/x/a": 1, "seg_train/x/b": 1, "seg_test/x/a": 1, "seg_pred": 1}),
        ("train: seg_train, test: seg_test",),
    ),
    "folds with other classes": (
        trees({"fold0/a": 1, "fold0/b": 1, "fold1/a": 1}),
        ("fold0", "splits"),
    ),
    "splits in the class folders": (
        trees({f"{name}/{split}": 1 for name in "ab" for split in ("train", "test")}),
        ("a/test", "SPLIT/CLASS"),
    ),
    "split folders without classes": (trees({"train": 2, "test": 1}), ("class folder",)),
    # 3. class names and columns
    "names that are numbers": (
        both([1, 2, 3], [1, 2, 3]),
        ("class 0", "test.parquet", "classes:"),
    ),
    "a name that is null": (both(["a", None], ["a", None]), ("class 1", "null", "classes:")),
    "a name given twice": (both(["a", "b", "a"], ["a", "b"]), ("'a'", "two classes")),
    "a blank name": (both(["a", " "], ["a", " "]), ("' '", "blank")),
    "names that are no list": (both({"0": "a", "1": "b"}, None), ("not a list", "classes:")),
    "names that are one text": (both("cat dog", None), ("'cat dog'", "not a list")),
    "no names": (both(None, None), ("no class names", "classes:")),
    "no names, labels that are texts": (
        one(["a", "b"], None),
        ("'a', 'b'", "classes:"),
    ),
    "a single class": (both(["cat"], ["cat"]), ("only one class", "'cat'", "two")),
    "a single class of folders": (trees({"train/cat": 2, "test/cat": 1}), ("one class", "cat")),
    "no label column": (columns(image=BYTES, size=BYTES), ("image, size", "label_column")),
    "no image column": (
        columns(picture=BYTES, label=pa.array([0, 1])),
        ("picture", "image_column"),
    ),
    "two columns that may be labels": (
        columns(image=BYTES, labels=pa.array([0, 1]), target=pa.array([0, 1])),
        ("labels, target", "label_column: labels"),
    ),
    "a column name twice": (doubled_column, ("2 columns", "label")),
    "images that are numbers": (
        columns(image=pa.array([1, 2]), label=pa.array([0, 1])),
        ("int64", "image_column"),
    ),
    "images that are arrays of pixels": (
        columns(pixel_values=pa.array([[1.0], [2.0]]), label=pa.array([0, 1])),
        ("list", "pixel_values"),
    ),
    "images that are paths": (
        columns(image=pa.array(["a.png", "b.png"]), label=pa.array([0, 1])),
        ("string", "image"),
    ),
    "images that are structs of paths": (
        columns(image=pa.array([{"path": "a.png"}] * 2), label=pa.array([0, 1])),
        ("only the paths",),
    ),
    "labels that are floats": (
        columns(image=BYTES, label=pa.array([0.0, 1.0])),
        ("double", "label_column"),
    ),
    "metadata that are no JSON": (one([0, 1], given=b"{"), ("no class names", "classes:")),
    "a label below zero": (one([0, 1, -1]), ("row 2", "-1 marks")),
    "a label above the names": (one([0, 1, 3]), ("row 2", "label 3", "3 classes")),
    "a label that is null": (one([0, None, 1]), ("row 1", "label None")),
    "a text that is no class": (one(["cat", "horse"]), ("row 1", "'horse'")),
    # 5. and 9. places
    "an image in no class folder": (
        with_files(trees(TWO), "train/cover.png"),
        ("cover.png", "CLASS/image.jpg"),
    ),
    "Parquet files and folders of images": (
        with_files(trees({"cat": 1, "dog": 1}), "metadata.parquet"),
        ("metadata.parquet", "cat/0.png", "data:"),
    ),
    "no Parquet file": (
        with_files(trees({}), "train.parquet", data=b"PAR1 and more"),
        ("train.parquet", "get it again"),
    ),
    "an empty Parquet file": (with_files(trees({}), "train.parquet", data=b""), ("train.parquet",)),
    "an empty folder": (lambda folder: (folder / "images").mkdir(), ("nothing under", "images")),
    "no folder": (lambda folder: None, ("nothing under", "images")),
    "only hidden files": (with_files(trees({}), ".a/b.png"), ("1 hidden",)),
    "an archive": (elsewhere("{folder}/x.zip", x__zip=b"PK"), ("x.zip", "unpack it")),
    "archives in a folder": (with_files(trees({}), "0.tar", "1.tar"), ("0.tar", "unpack them")),
    "a single file": (elsewhere("{folder}/x.parquet", x__parquet=b"PAR1"), ("is a file", "folder")),
    "tables of another kind": (with_files(trees({}), "train.csv"), ("train.csv", "Parquet")),
    "a server that is down": (elsewhere("http://127.0.0.1:9/images"), ("127.0.0.1:9", "server")),
    "a user that does not exist": (elsewhere("~nobody-of-this-name/images"), ("no such user",)),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(
    make: Make, words: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = make(tmp_path) or {}
    code, out, err = plan(tmp_path, capsys, [own(tmp_path, **fields)], "--json")
    assert code == 1, (out, err)
    for word in words:
        assert word in err
    assert "own: " in err or "tasks[0]" in err
    assert "Traceback" not in err and "Error" not in err


def counts(document: Any) -> dict[str, dict[str, int]]:
    found = document["tasks"]["own"]["classes"]
    return {name: {split: n for split, n in each.items() if n} for name, each in found.items()}


SIX = {"cat": {"train": 2, "val": 2, "test": 2}, "dog": {"train": 2, "val": 2, "test": 2}}
TAKEN: dict[str, tuple[Make, Any, dict[str, int], Sequence[str]]] = {
    "folders": (trees(TWO), SIX, {}, ()),
    "labels in another order": (
        both(["cat", "dog", "cow"], ["dog", "cow", "cat"]),
        None,
        {},
        ("matched by name", "cat, dog, cow", "dog, cow, cat"),
    ),
    "fewer names in test": (both(["cat", "dog", "cow"], ["cow", "cat"]), None, {}, ("by name",)),
    "no names in test": (both(["cat", "dog", "cow"], None), None, {}, ("no class names in test",)),
    "usual columns": (
        tables("train.parquet", "test.parquet", images="img", column="fine_label"),
        None,
        {},
        ("images are taken from the column img", "labels are taken from the column fine_label"),
    ),
    "a number that is not there": (
        tables("train-0.parquet", "train-2.parquet", "test.parquet"),
        None,
        {},
        ("number 1 is not there",),
    ),
    "parts that Spark wrote": (
        tables("train/part-00000-ab.c000.snappy.parquet", "test/part-00000-cd.c000.snappy.parquet"),
        None,
        {},
        (),
    ),
    "other files": (
        with_files(trees(TWO), "train/cat/a.txt", "train/cat/b.TXT", ".c", "train/.d/e.png"),
        SIX,
        {"files that are not images (.txt)": 2, "hidden files and folders": 2},
        (),
    ),
    "files beside Parquet": (
        with_files(tables("train.parquet", "test.parquet"), "README.md", "assets/logo.png"),
        None,
        {"files that are not Parquet (.md)": 1, "images beside the Parquet files (.png)": 1},
        (),
    ),
    "folders that Spark wrote": (
        tables("train.parquet/part-0.c000.parquet", "test.parquet/part-0.c000.parquet"),
        None,
        {},
        (),
    ),
    "folders with the name of a column": (
        tables("split=train/0.parquet", "split=test/0.parquet"),
        None,
        {},
        (),
    ),
    "names in place of those that the labels have": (
        both_texts(["cat", "dog"], classes=["kitty", "puppy"]),
        {"kitty": {"val": 1, "test": 1}, "puppy": {"train": 1, "test": 1}},
        {},
        (),
    ),
    "folders that no split uses": (
        trees(TWO | {"annotations/cow": 3, "extra/pig": 1, ".": 1}),
        SIX,
        {
            "in annotations, which no split uses": 3,
            "in extra, which no split uses": 1,
            "beside the splits, which no split uses": 1,
        },
        (),
    ),
    "classes with the names of splits": (
        trees({"train": 5, "bus": 5, "car": 5}, splits={"test": 0.2, "val": 0.2}),
        None,
        {},
        ("train are taken as classes",),
    ),
    "links into a folder that no split uses": (
        with_links(
            trees({"pool/cat": 1, "pool/dog": 1, "test/cat": 1, "test/dog": 1, "val/cat": 1}),
            train="pool",
        ),
        {"cat": {"train": 1, "val": 1, "test": 1}, "dog": {"train": 1, "test": 1}},
        {},
        (),
    ),
    "a class of videos": (
        with_files(trees(TWO), "train/cow/a.mp4", "train/cow/b.mp4"),
        SIX,
        {"files that are not images (.mp4)": 2},
        ("no classes: cow (2 files)",),
    ),
    "links that lead upwards": (
        with_links(trees(TWO), test__cat__up="../..", train__cat__up="../..", train__cat__self="."),
        SIX,
        {"links to files and folders that are read already": 3},
        (),
    ),
    "a broken link": (
        with_links(trees(TWO), train__cat__gone="/nowhere/at/all.png"),
        SIX,
        {"broken links": 1},
        (),
    ),
    "a link in a circle": (
        with_links(trees(TWO), train__cat__me="me"),
        SIX,
        {"broken links": 1},
        (),
    ),
    "a link to an image": (
        with_links(trees(TWO), **{"train__cat__again.png": "0.png"}),
        SIX,
        {"links to files and folders that are read already": 1},
        (),
    ),
}


@pytest.mark.parametrize(("make", "found", "left_out", "warnings"), TAKEN.values(), ids=TAKEN)
def test_taken_as_it_is_meant(
    make: Make,
    found: Any,
    left_out: dict[str, int],
    warnings: Sequence[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields = make(tmp_path) or {}
    code, out, err = plan(tmp_path, capsys, [own(tmp_path, **fields)], "--json")
    assert code == 0, err
    document = json.loads(out)
    assert found is None or counts(document) == found
    assert document["tasks"]["own"]["left_out"] == left_out
    for warning in warnings:
        assert any(warning in line for line in document["tasks"]["own"]["warnings"])


def test_an_image_in_two_classes_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", TWO)
    dog = tmp_path / "images" / "val" / "dog" / "0.png"
    dog.write_bytes((tmp_path / "images" / "train" / "cat" / "1.png").read_bytes())
    code, out, _ = plan(tmp_path, capsys, [own(tmp_path)], "--json")
    (warning,) = json.loads(out)["tasks"]["own"]["warnings"]
    assert code == 0 and "1 image has the pixels of another class" in warning
    assert "train/cat/1.png of train (cat)" in warning
    assert "val/dog/0.png of val (dog)" in warning


def test_a_file_that_is_no_image_by_its_size_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", TWO)
    with (tmp_path / "images" / "train" / "cat" / "big.jpg").open("wb") as file:
        file.truncate(2**32)  # takes no space on the disk
    code, out, _ = plan(tmp_path, capsys, [own(tmp_path)], "--json")
    document = json.loads(out)
    assert code == 0 and counts(document) == SIX
    assert document["tasks"]["own"]["left_out"] == {"files larger than 256 MB": 1}


def test_sockets_and_pipes_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", TWO)
    os.mkfifo(tmp_path / "images" / "train" / "cat" / "pipe.png")
    monkeypatch.chdir(tmp_path / "images" / "train" / "cat")  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        code, out, _ = plan(tmp_path, capsys, [own(tmp_path)], "--json")
    document = json.loads(out)
    assert code == 0 and counts(document) == SIX
    assert document["tasks"]["own"]["left_out"] == {"neither files nor folders": 2}


def test_labels_are_matched_by_name(tmp_path: Path) -> None:
    """Every image has its class's shade of grey, and each file its own order of the names."""
    orders = {
        "train-0-of-2.parquet": ["cat", "dog", "cow"],
        "train-1-of-2.parquet": ["cow", "dog", "cat"],
        "test.parquet": ["dog", "cow"],
    }
    (tmp_path / "images").mkdir()
    for file, names in orders.items():
        shades = [np.full((32, 32, 3), 40 * CLASSES.index(name), np.uint8) for name in names]
        images = pa.array([{"bytes": encoded(Image.fromarray(shade))} for shade in shades])
        found = pa.table({"image": images, "label": list(range(len(names)))})
        features = {"info": {"features": {"label": {"names": names}}}}
        metadata = {"huggingface": json.dumps(features)}
        pq.write_table(found.replace_schema_metadata(metadata), tmp_path / "images" / file)
    task = TaskConfig(**own(tmp_path, splits={"val": 0.1}))
    for split, count in (("train", 5), ("test", 2)):
        found_split = load_split(task, split, SQUASH)
        assert len(found_split) == count and found_split.classes == CLASSES
        for image, label in zip(found_split.images, found_split.labels, strict=True):
            assert int(image.max()) == 40 * int(label)
