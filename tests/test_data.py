"""Data sets created in the tests, in every form that can be read."""

import gzip
import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raytvb.data.census import take_census
from raytvb.data.decoding import AS_USUAL
from raytvb.data.image_source import SPLITS
from raytvb.data.load_split import load_split
from raytvb.data.preprocess import Preprocess
from raytvb.data.splits import Split, split_parts, task_classes, task_source
from raytvb.errors import UserError
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.storage.store import Store

SQUASH = Preprocess(
    32, (0.5,) * 3, (0.5,) * 3, {"size": 32, "interpolation": "bicubic", "resize_mode": "squash"}
)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A random smooth picture; size as (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_parquet(
    path: Path,
    images: list[Any],
    labels: list[Any],
    *,
    image: str = "image",
    label: str = "label",
    names: list[str] | None = None,
    group: int = 4,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({image: images, label: labels, "extra": list(range(len(labels)))})
    if names is not None:
        features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, row_group_size=group)


def own_task(folder: Path, **fields: Any) -> TaskConfig:
    return TaskConfig.model_validate({"name": "own", "data": str(folder), **fields})


def needs(task: TaskConfig, splits: Sequence[str]) -> list[str]:
    """The class names of a task whose data must have these splits."""
    return [*take_census(task, AS_USUAL, 1, splits=splits, decode=False).classes]


def pixels(split: Split) -> np.ndarray:
    return split.images.permute(0, 2, 3, 1).numpy()


def test_jpegs_of_another_size_and_other_column_names_are_resized(tmp_path: Path) -> None:
    pictures = [picture(s, (48, 40)) for s in range(10)]
    data = [encoded(p, "JPEG", quality=95) for p in pictures]
    for split in ("train", "validation", "test"):
        write_parquet(
            tmp_path / "data" / f"{split}-00000-of-00001.parquet",
            data,
            [k % 3 for k in range(10)],
            image="img",
            label="digit",
            names=["zero", "one", "two"],
        )
    task = own_task(tmp_path, image_column="img", label_column="digit")
    for split in SPLITS:
        found = load_split(task, split, SQUASH)
        assert found.images.shape == (10, 3, 32, 32) and found.classes == ("zero", "one", "two")
        assert found.labels.tolist() == [k % 3 for k in range(10)]
        expected = [
            np.asarray(Image.open(io.BytesIO(d)).resize((32, 32), Image.Resampling.BICUBIC))
            for d in data
        ]
        assert np.array_equal(pixels(found), np.stack(expected))


def test_shortest_side_resizing_cuts_the_middle_out(tmp_path: Path) -> None:
    config = {"size": 32, "interpolation": "bicubic", "resize_mode": "shortest"}
    image = picture(1, (64, 32))
    write_parquet(tmp_path / "test.parquet", [encoded(image)], [0])
    found = load_split(
        own_task(tmp_path, classes=["a", "b"]),
        "test",
        Preprocess(32, (0.5,) * 3, (0.5,) * 3, config),
    )
    assert np.array_equal(pixels(found)[0], np.asarray(image)[:, 16:48])


def test_structs_and_plain_bytes_and_other_image_modes_are_read(tmp_path: Path) -> None:
    grey, colour = picture(1).convert("L"), picture(2)
    alpha, palette = colour.convert("RGBA"), colour.quantize(16)
    images = [{"bytes": encoded(i), "path": None} for i in (grey, colour, alpha, palette)]
    write_parquet(tmp_path / "test.parquet", images, [0, 0, 1, 1], names=["a", "b"])
    write_parquet(
        tmp_path / "val.parquet", [i["bytes"] for i in images], [0, 0, 1, 1], names=["a", "b"]
    )
    expected = [np.asarray(i.convert("RGB")) for i in (grey, colour, alpha, palette)]
    assert np.array_equal(
        pixels(load_split(own_task(tmp_path), "test", SQUASH)), np.stack(expected)
    )
    assert np.array_equal(pixels(load_split(own_task(tmp_path), "val", SQUASH)), np.stack(expected))


def test_a_yes_or_no_label_is_a_class_number(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "test.parquet",
        [encoded(picture(k)) for k in range(3)],
        [True, False, True],
        names=["no", "yes"],
    )
    labels = load_split(own_task(tmp_path), "test", SQUASH).labels
    assert labels.dtype == torch.int64 and labels.tolist() == [1, 0, 1]


def test_grey_images_of_sixteen_bits_are_scaled_and_floats_are_unreadable(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(32) * 8, (32, 1))
    images = [
        encoded(Image.fromarray((ramp * 257).astype(np.uint16)), form) for form in ("PNG", "TIFF")
    ]
    images += [encoded(Image.fromarray((ramp / 255).astype(np.float32)), "TIFF")]
    write_parquet(tmp_path / "test.parquet", images, [0, 0, 0], names=["a", "b"])
    found = load_split(own_task(tmp_path), "test", SQUASH)
    assert found.skipped == 1 and np.array_equal(
        pixels(found), np.stack([ramp] * 2)[..., None].repeat(3, axis=3)
    )
    with pytest.raises(UserError, match="row 2 is not a readable image: its pixels are floats"):
        load_split(own_task(tmp_path, max_corrupt=0), "test", SQUASH)


def test_labels_may_be_names_of_classes(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "test.parquet", [encoded(picture(k)) for k in range(3)], ["dog", "cat", "dog"]
    )
    assert load_split(
        own_task(tmp_path, classes=["cat", "dog"]), "test", SQUASH
    ).labels.tolist() == [1, 0, 1]
    with pytest.raises(
        UserError, match=r"row 0 has label 'dog'; labels are integers, .* or names of `classes`"
    ):
        load_split(own_task(tmp_path, classes=["cat", "horse"]), "test", SQUASH)


def test_class_names_of_one_split_serve_all(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [encoded(picture(1))] * 2, [1, 0], names=["a", "b"])
    write_parquet(tmp_path / "test.parquet", [encoded(picture(1))], [1])
    assert load_split(own_task(tmp_path), "test", SQUASH).classes == ("a", "b")


def test_a_column_of_paths_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", ["a.png", "b.png"], [0, 0], names=["a", "b"])
    with pytest.raises(UserError, match="column image holds string, not encoded images"):
        load_split(own_task(tmp_path), "test", SQUASH)


def test_a_sample_reads_the_row_groups_that_it_is_in(tmp_path: Path) -> None:
    """The second row group is damaged; a sample of the others does not notice."""
    images = [encoded(picture(k)) for k in range(12)]
    write_parquet(
        tmp_path / "test.parquet", images, list(range(12)), names=[f"c{k}" for k in range(12)]
    )
    data = bytearray((tmp_path / "test.parquet").read_bytes())
    chunk = pq.ParquetFile(tmp_path / "test.parquet").metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    (tmp_path / "test.parquet").write_bytes(bytes(data))
    seed = next(
        s
        for s in range(999)
        if not {4, 5, 6, 7}
        & set(torch.randperm(12, generator=torch.Generator().manual_seed(s))[:3].tolist())
    )
    sampled = load_split(
        own_task(tmp_path), "test", SQUASH, sample=3, generator=torch.Generator().manual_seed(seed)
    )
    assert len(sampled) == 3
    with pytest.raises((OSError, UserError), match=r"test\.parquet"):
        load_split(own_task(tmp_path), "test", SQUASH)


def test_several_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in (1, 0):
        images = [encoded(picture(10 * number + k)) for k in range(6)]
        write_parquet(
            tmp_path / f"test-0000{number}-of-00002.parquet", images, [number] * 6, names=["a", "b"]
        )
    found = load_split(own_task(tmp_path), "test", SQUASH)
    assert found.labels.tolist() == [0] * 6 + [1] * 6
    assert np.array_equal(pixels(found)[7], np.asarray(picture(11)))


def test_validation_is_carved_from_training_where_there_is_none(tmp_path: Path) -> None:
    count = 95
    images, labels = [encoded(picture(k)) for k in range(count)], [k % 5 for k in range(count)]
    write_parquet(tmp_path / "train.parquet", images, labels, names=list("abcde"))
    write_parquet(tmp_path / "test.parquet", [encoded(picture(1000))], [0], names=list("abcde"))
    made = {split: load_split(own_task(tmp_path), split, SQUASH) for split in SPLITS}
    parts = {split: {i.tobytes() for i in pixels(found)} for split, found in made.items()}
    assert len(made["train"]) + len(made["val"]) == count == len(parts["train"] | parts["val"])
    assert not parts["train"] & parts["val"] and 0.09 <= len(made["val"]) / count <= 0.11
    assert len(made["test"]) == 1
    again = load_split(own_task(tmp_path), "val", SQUASH)
    assert torch.equal(again.images, made["val"].images) and torch.equal(
        again.labels, made["val"].labels
    )


def test_given_class_names_come_before_those_in_the_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", [encoded(picture(1))], [1], names=["a", "b"])
    assert load_split(own_task(tmp_path), "test", SQUASH).classes == ("a", "b")
    assert load_split(own_task(tmp_path, classes=["x", "y"]), "test", SQUASH).classes == ("x", "y")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"pandas": "{}"},
        {"huggingface": "no JSON"},
        {"huggingface": "{}"},
        {"huggingface": '{"info": {"features": null}}'},
        {"huggingface": '{"info": {"features": {"label": {"dtype": "int64"}}}}'},
    ],
)
def test_missing_class_names_are_an_error_that_says_how_to_give_them(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    table = pa.table({"image": [encoded(picture(1))], "label": [0]}).replace_schema_metadata(
        metadata
    )
    pq.write_table(table, tmp_path / "test.parquet")
    with pytest.raises(UserError, match=r"task own: .* no class names .*classes:"):
        load_split(own_task(tmp_path), "test", SQUASH)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def with_header(data: bytes, start: int, field: bytes, *, checksum: bool = True) -> bytes:
    """A PNG with another value in its header chunk. The checksum of the chunk is corrected."""
    changed = data[:start] + field + data[start + len(field) :]
    return (
        changed[:29] + struct.pack(">I", zlib.crc32(changed[12:29])) + changed[33:]
        if checksum
        else changed
    )


UNREADABLE = {
    "empty": b"",
    "text": b"not an image",
    "null": None,
    "half a PNG": cut(encoded(picture(3))),
    "half a JPEG": cut(encoded(picture(3), "JPEG")),
    "no compressed data": encoded(picture(3)).replace(b"IDAT\x78", b"IDAT\x00"),
    "a chunk too short": with_header(
        encoded(picture(3)), 33, struct.pack(">I", 100), checksum=False
    ),
    "a trillion pixels": with_header(encoded(picture(3)), 16, struct.pack(">II", 10**6, 10**6)),
}


@pytest.mark.parametrize("bad", UNREADABLE.values(), ids=UNREADABLE)
def test_an_image_that_cannot_be_read_is_skipped_and_counted_or_named(
    tmp_path: Path, bad: bytes | None
) -> None:
    images: list[bytes | None] = [encoded(picture(k)) for k in range(8)]
    images[6] = bad
    write_parquet(tmp_path / "test.parquet", images, [k % 4 for k in range(8)], names=list("abcd"))
    found = load_split(own_task(tmp_path), "test", SQUASH)
    assert found.skipped == 1 and found.labels.tolist() == [0, 1, 2, 3, 0, 1, 3]
    assert np.array_equal(pixels(found)[6], np.asarray(picture(7)))
    with pytest.raises(
        UserError, match=r"task own: test\.parquet row 6 is not a readable image.*`max_corrupt: 0`"
    ):
        load_split(own_task(tmp_path, max_corrupt=0), "test", SQUASH)


@pytest.mark.parametrize("threads", [1, 3])
def test_more_unreadable_images_than_allowed_are_an_error_that_names_the_first(
    tmp_path: Path, threads: int
) -> None:
    images = [encoded(picture(k)) if k % 5 else b"broken" for k in range(60)]
    write_parquet(tmp_path / "test.parquet", images, [0] * 60, names=["a", "b"])
    found = load_split(own_task(tmp_path, max_corrupt=12), "test", SQUASH, threads=threads)
    assert found.skipped == 12 and len(found) == 48
    with pytest.raises(
        UserError,
        match=r"test\.parquet row 0 is not .*, and 10 more of test; up to `max_corrupt: 10`",
    ):
        load_split(own_task(tmp_path), "test", SQUASH, threads=threads)


def test_a_split_of_unreadable_images_only_is_empty(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", [{"bytes": None}], [0], names=["a", "b"])
    with pytest.raises(
        UserError, match=r"the test split .* is empty: test\.parquet row 0 .*there is no image"
    ):
        load_split(own_task(tmp_path), "test", SQUASH)


@pytest.mark.parametrize("bad", [3, -1, None])
def test_a_label_outside_of_the_classes_is_named(tmp_path: Path, bad: int | None) -> None:
    write_parquet(
        tmp_path / "test.parquet",
        [encoded(picture(k)) for k in range(8)],
        [0, 1, 2, 0, 1, bad, 0, 0],
        names=["a", "b", "c"],
    )
    rule = "; labels are integers" if bad is None else ".*, but the file names 3 classes"
    with pytest.raises(UserError, match=rf"task own: test\.parquet row 5 has label {bad}{rule}"):
        load_split(own_task(tmp_path), "test", SQUASH)


@pytest.mark.parametrize(
    ("fields", "column"), [({"image_column": "img"}, "img"), ({"label_column": "digit"}, "digit")]
)
def test_a_missing_column_is_named_with_those_there_are(
    tmp_path: Path, fields: dict[str, str], column: str
) -> None:
    write_parquet(tmp_path / "test.parquet", [encoded(picture(1))], [0])
    with pytest.raises(
        UserError,
        match=rf"task own: .*test\.parquet has no column {column}; it has image, label, extra",
    ):
        load_split(own_task(tmp_path, classes=["a", "b"], **fields), "test", SQUASH)


def test_an_empty_split_and_a_folder_without_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"task own: there is nothing under {tmp_path}"):
        load_split(own_task(tmp_path), "test", SQUASH)
    (tmp_path / "notes.txt").write_text("no data")
    with pytest.raises(
        UserError, match=rf"task own: no Parquet files .* and no folders of images under {tmp_path}"
    ):
        load_split(own_task(tmp_path), "test", SQUASH)
    with pytest.raises(
        UserError, match=r"notes\.txt is a file; `data:` must be the folder that it is in"
    ):
        load_split(own_task(tmp_path / "notes.txt"), "test", SQUASH)
    empty = pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())})
    pq.write_table(empty, tmp_path / "test.parquet")
    with pytest.raises(UserError, match=rf"task own: the test split under {tmp_path} is empty"):
        load_split(own_task(tmp_path, classes=["a", "b"]), "test", SQUASH)
    with pytest.raises(
        UserError,
        match=r"no train split .* \(there is test \(used for test\); left out: 1 .*\); `splits:",
    ):
        load_split(own_task(tmp_path, classes=["a", "b"]), "train", SQUASH)


@pytest.mark.parametrize(
    "names",
    [
        (
            "train-00000-of-00002",
            "train-00001-of-00002",
            "validation-00000-of-00001",
            "test-00000-of-00001",
        ),
        (
            "default/train/0000",
            "default/train/0001",
            "default/validation/0000",
            "default/test/0000",
        ),
        (
            "data/train-00000-of-00002-b42a775f407cee45",
            "data/train-00001-of-00002-0badcafe0badcafe",
            "data/valid",
            "data/test",
        ),
        ("train_a", "train_b", "dev", "testing_1"),
    ],
)
def test_files_of_a_split_are_found_by_the_names_in_use(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for number, name in enumerate(names):
        write_parquet(
            tmp_path / f"{name}.parquet", [encoded(picture(number))], [number], names=list("abcd")
        )
    found = {s: load_split(own_task(tmp_path), s, SQUASH).labels.tolist() for s in SPLITS}
    assert found == {"train": [0, 1], "val": [2], "test": [3]}


def test_files_of_a_split_in_several_folders_are_an_error_that_lists_them(tmp_path: Path) -> None:
    for folder in ("cropped_digits", "full_numbers"):
        write_parquet(
            tmp_path / folder / "train-00000-of-00001.parquet",
            [encoded(picture(1))],
            [0],
            names=["a", "b"],
        )
    with pytest.raises(
        UserError,
        match=r"train files in several folders \(cropped_digits, full_numbers\); name one",
    ):
        load_split(own_task(tmp_path), "train", SQUASH)
    one = own_task(tmp_path / "full_numbers", splits={"val": "train"})
    assert len(load_split(one, "val", SQUASH)) == 1


def test_splits_by_name_and_by_share(tmp_path: Path) -> None:
    sizes = {"train": 50, "validation": 7, "extra": 4}
    for number, (name, size) in enumerate(sizes.items()):
        images = [encoded(picture(100 * number + k)) for k in range(size)]
        write_parquet(tmp_path / f"{name}.parquet", images, [number] * size, names=["a", "b", "c"])

    def found(**splits: Any) -> dict[str, set[bytes]]:
        task = own_task(tmp_path, splits=splits)
        return {
            s: {i.tobytes() for i in load_split(task, s, SQUASH).images.numpy()} for s in SPLITS
        }

    def sizes_of(made: dict[str, set[bytes]]) -> dict[str, int]:
        assert (
            not made["train"] & made["val"]
            and not made["train"] & made["test"]
            and not made["val"] & made["test"]
        )
        return {s: len(i) for s, i in made.items()}

    with pytest.raises(
        UserError, match=r"no test split .*extra, train \(used for train\).*`splits: {test"
    ):
        found()
    assert sizes_of(found(test="extra")) == {"train": 50, "val": 7, "test": 4}
    assert sizes_of(found(test="validation")) == {
        "train": 45,
        "val": 5,
        "test": 7,
    }  # the pool cannot be val as well
    shares = found(test=0.2, val=0.3)
    assert sizes_of(shares) == {"train": 25, "val": 15, "test": 10}
    assert found(test=0.2, val=0.3) == shares
    assert found(test=0.2, val=0.3, seed=1) != shares
    assert sizes_of(found(train="extra", test=0.25, val="train")) == {
        "train": 3,
        "val": 50,
        "test": 1,
    }
    with pytest.raises(UserError, match=r"splits\.test: nope: .* has extra, train, validation"):
        found(test="nope")


def test_one_row_group_of_any_size_is_not_held_in_memory(tmp_path: Path) -> None:
    """35 MB of images are in a single row group. The reader's memory may grow by half of that."""
    noise = np.random.default_rng(0).integers(0, 256, (384, 384, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "BMP")
    rows = [data[: 60 + k] + bytes([k % 256]) + data[61 + k :] for k in range(80)]
    write_parquet(tmp_path / "test.parquet", rows, [0] * 80, names=["a", "b"], group=10**6)
    assert pq.ParquetFile(tmp_path / "test.parquet").num_row_groups == 1
    code = """
import resource, sys
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.data.load_split import load_split
from raytvb.data.preprocess import Preprocess
config = {"size": 32, "interpolation": "bicubic", "resize_mode": "squash"}
preprocess = Preprocess(32, (0.5,) * 3, (0.5,) * 3, config)
small, large = (TaskConfig(name="own", data=d) for d in sys.argv[1:])
load_split(small, "test", preprocess)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(load_split(large, "test", preprocess)) == 80
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    write_parquet(tmp_path / "small" / "test.parquet", rows[:2], [0] * 2, names=["a", "b"])
    (tmp_path / "large").mkdir()
    (tmp_path / "test.parquet").rename(tmp_path / "large" / "test.parquet")
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, whole = float(run.stdout), (tmp_path / "large" / "test.parquet").stat().st_size / 2**20
    assert whole > 30 and grown < whole / 2, f"{grown:.0f} of {whole:.0f} MB"


def test_a_sample_is_drawn_in_the_order_of_the_generator(tmp_path: Path) -> None:
    images = [encoded(picture(k)) if k != 5 else b"broken" for k in range(20)]
    write_parquet(
        tmp_path / "test.parquet", images, list(range(20)), names=[f"c{k}" for k in range(20)]
    )
    found = load_split(
        own_task(tmp_path), "test", SQUASH, sample=12, generator=torch.Generator().manual_seed(1)
    )
    drawn = torch.randperm(20, generator=torch.Generator().manual_seed(1))[:12].tolist()
    assert 5 in drawn and found.skipped == 1
    assert found.labels.tolist() == [k for k in drawn if k != 5]
    for label, image in zip(found.labels.tolist(), pixels(found), strict=True):
        assert np.array_equal(image, np.asarray(picture(label)))
    assert len(load_split(own_task(tmp_path), "test", SQUASH, sample=99)) == 19


def write_tree(root: str, names: list[str]) -> None:
    """PNG files with the given names. File k shows picture k."""
    store = Store(root)
    for number, name in enumerate(names):
        store.write(name, encoded(picture(number), "JPEG" if name.endswith("jpg") else "PNG"))


@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_a_folder_per_class_under_a_folder_per_split(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = (
        str(tmp_path / "pets")
        if kind == "local"
        else f"{request.getfixturevalue('s3_environment')}/pets"
    )
    names = [
        "Train/cat/1.png",
        "Train/cat/2.png",
        "Train/grey_wolf/deep/er/1.PNG",
        "test/cat/9.png",
        "test/owl/1.png",
        "valid/grey_wolf/3.png",
    ]
    write_tree(root, names)
    for name in (
        "Train/cat/notes.txt",
        "Train/cat/._1.png",
        ".cache/x.png",
        "__MACOSX/Train/cat/1.png",
    ):
        Store(root).write(name, b"no image")
    task = TaskConfig(name="pets", data=root)
    assert task_classes(task) == ("cat", "grey_wolf", "owl")
    found = {s: load_split(task, s, SQUASH) for s in SPLITS}
    assert {s: f.labels.tolist() for s, f in found.items()} == {
        "train": [0, 0, 1],
        "val": [1],
        "test": [0, 2],
    }
    assert np.array_equal(pixels(found["test"]), np.stack([np.asarray(picture(k)) for k in (3, 4)]))
    asked = TaskConfig.model_validate(
        {"name": "pets", "data": root, "splits": {"train": "Train", "val": "valid"}}
    )
    assert load_split(asked, "train", SQUASH).labels.tolist() == [0, 0, 1]
    named = TaskConfig(name="pets", data=root, classes=("a cat", "a wolf", "an owl"))
    assert load_split(named, "val", SQUASH).classes == ("a cat", "a wolf", "an owl")
    with pytest.raises(
        UserError, match=r"2 `classes` are given for 3 classes: .*cat, grey_wolf, owl"
    ):
        load_split(TaskConfig(name="pets", data=root, classes=("cat", "wolf")), "val", SQUASH)


def test_file_names_of_any_characters_are_read(tmp_path: Path) -> None:
    names = [
        "test/cat sat/a b.png",
        "test/cat sat/what?.png",
        "test/d\u00f6g/#1.png",
        "test/d\u00f6g/x[1]*%20.png",
    ]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture(number)))
    found = load_split(own_task(tmp_path), "test", SQUASH)
    assert found.classes == ("cat sat", "d\u00f6g") and found.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(pixels(found), np.stack([np.asarray(picture(k)) for k in range(4)]))


def test_a_folder_per_class_alone_is_split_by_shares(tmp_path: Path) -> None:
    write_tree(str(tmp_path), [f"{c}/{k}.png" for c in ("cat", "dog") for k in range(20)])
    parts = {s: load_split(own_task(tmp_path), s, SQUASH) for s in SPLITS}
    assert {s: len(p) for s, p in parts.items()} == {"train": 28, "val": 4, "test": 8}
    assert len({i.tobytes() for p in parts.values() for i in p.images.numpy()}) == 40
    assert set(parts["test"].labels.tolist()) == {
        0,
        1,
    }  # a seeded permutation, not the first or last
    other = {
        s: len(load_split(own_task(tmp_path, splits={"test": 0.5, "val": 0.25}), s, SQUASH))
        for s in SPLITS
    }
    assert other == {"train": 10, "val": 10, "test": 20}


def test_an_image_outside_of_the_class_folders_is_named(tmp_path: Path) -> None:
    write_tree(str(tmp_path), ["train/cat/1.png", "train/2.png", "test/dog/1.png"])
    with pytest.raises(UserError, match=r"train/2\.png is not in a class folder"):
        task_classes(own_task(tmp_path))
    flat = tmp_path / "flat"
    write_tree(str(flat), ["1.png", "2.png"])
    with pytest.raises(UserError, match=r"flat/1\.png is not in a class folder"):
        task_classes(own_task(flat))


def test_a_folder_too_high_or_too_low_is_an_error(tmp_path: Path) -> None:
    write_tree(
        str(tmp_path),
        [f"pets/{s}/{c}/{k}.png" for s in ("train", "test") for c in ("a", "b") for k in (1, 2)],
    )
    with pytest.raises(
        UserError,
        match=r"are in one class, pets; `data:` must be the folder above the class folders",
    ):
        task_classes(own_task(tmp_path))
    with pytest.raises(UserError, match="is not in a class folder"):
        task_classes(own_task(tmp_path / "pets" / "train" / "a"))
    assert task_classes(own_task(tmp_path / "pets")) == ("a", "b")


def test_folders_of_splits_with_other_names_have_to_be_named(tmp_path: Path) -> None:
    write_tree(
        str(tmp_path),
        [f"{f}/{c}/{k}.png" for f in ("fold0", "fold1") for c in ("a", "b") for k in range(10)],
    )
    with pytest.raises(
        UserError, match=r"fold0, fold1, which look like splits \(fold0/a, fold0/b, .*train: NAME"
    ):
        task_classes(own_task(tmp_path))
    named = own_task(tmp_path, splits={"train": "fold0", "test": "fold1"})
    assert task_classes(named) == ("a", "b")
    assert {s: len(load_split(named, s, SQUASH)) for s in SPLITS} == {
        "train": 18,
        "val": 2,
        "test": 20,
    }


def test_what_a_split_lacks_is_told_without_reading_images(tmp_path: Path) -> None:
    write_tree(str(tmp_path), [f"train/{c}/{k}.png" for c in ("a", "b") for k in range(3)])
    assert needs(own_task(tmp_path), ["train", "val"]) == ["a", "b"]
    with pytest.raises(
        UserError, match=r"no test split .* \(there is train \(used for train\)\); .*such as 0\.1"
    ):
        needs(own_task(tmp_path), SPLITS)
    with pytest.raises(
        UserError, match=r"no train split .* \(used for val\)\); `splits: {train: NAME}`"
    ):
        needs(own_task(tmp_path, splits={"val": "train"}), SPLITS)
    with pytest.raises(UserError, match=r"splits\.val: tenth: .* a number, such as 0\.1"):
        needs(own_task(tmp_path, splits={"val": "tenth"}), SPLITS)


def test_broken_files_of_a_folder_are_skipped_and_missing_ones_are_not(tmp_path: Path) -> None:
    write_tree(str(tmp_path), [*(f"test/cat/{k}.png" for k in range(5)), "train/dog/1.png"])
    (tmp_path / "test/cat/2.png").write_bytes(encoded(picture(2))[:300])
    found = load_split(own_task(tmp_path), "test", SQUASH)
    assert found.skipped == 1 and len(found) == 4
    with pytest.raises(UserError, match=r"test/cat/2\.png is not a readable image: .*truncated"):
        load_split(own_task(tmp_path, max_corrupt=0), "test", SQUASH)


def idx(array: np.ndarray) -> bytes:
    """The format of the MNIST files, gzipped."""
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def mnist(root: Path) -> dict[str, tuple[np.ndarray, list[int]]]:
    made, folder = {}, root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, prefix, count in (("train", "train", 30), ("test", "t10k", 6)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(idx(array))
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
        made[name] = (images, labels.tolist())
    return made


def test_a_torchvision_data_set_with_train_and_test(tmp_path: Path) -> None:
    made = mnist(tmp_path)
    task = TaskConfig(name="mnist", data="torchvision:MNIST", root=str(tmp_path))
    found = {s: load_split(task, s, SQUASH) for s in SPLITS}
    assert {s: len(f) for s, f in found.items()} == {"train": 27, "val": 3, "test": 6}
    assert (
        found["test"].labels.tolist() == made["test"][1] and found["test"].classes[3] == "3 - three"
    )
    expected = [
        np.asarray(Image.fromarray(i).resize((32, 32), Image.Resampling.BICUBIC))
        for i in made["test"][0]
    ]
    assert np.abs(pixels(found["test"]).astype(int) - np.stack(expected)[..., None]).max() <= 1


def eurosat(root: Path) -> None:
    write_tree(
        str(root / "eurosat" / "2750"),
        [f"{c}/{k}.jpg" for c in ("Forest", "River") for k in range(10)],
    )


def rendered_sst2(root: Path) -> None:
    write_tree(
        str(root / "rendered-sst2"),
        [
            f"{s}/{c}/{k}.png"
            for s in ("train", "valid", "test")
            for c in ("negative", "positive")
            for k in range(5)
        ],
    )


@pytest.mark.parametrize(
    ("name", "make", "sizes", "classes"),
    [
        ("EuroSAT", eurosat, {"train": 14, "val": 2, "test": 4}, ("Forest", "River")),
        (
            "RenderedSST2",
            rendered_sst2,
            {"train": 10, "val": 10, "test": 10},
            ("negative", "positive"),
        ),
    ],
)
def test_torchvision_data_sets_with_and_without_splits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    make: Callable[[Path], None],
    sizes: dict[str, int],
    classes: tuple[str, ...],
) -> None:
    monkeypatch.setenv("RAYTVB_CACHE", str(tmp_path))
    make(tmp_path / "torchvision")
    task = TaskConfig(name="own", data=f"torchvision:{name}")
    assert task_classes(task) == classes
    assert {s: len(load_split(task, s, SQUASH)) for s in SPLITS} == sizes


def test_a_torchvision_name_that_is_not_known_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"torchvision data set 'CIFAR' is not known here; .*CIFAR10, CIFAR100"
    ):
        task_classes(TaskConfig(name="own", data="torchvision:CIFAR", root=str(tmp_path)))


def test_a_torchvision_data_set_that_cannot_be_had_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"cannot get ImageNet: put its files under {tmp_path}"):
        task_classes(TaskConfig(name="own", data="torchvision:ImageNet", root=str(tmp_path)))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 10, 99, 100])
@pytest.mark.parametrize("shares", [{}, {"val": 0.004, "test": 0.2}, {"val": 0.5, "test": 0.004}])
def test_no_image_is_in_two_splits(tmp_path: Path, count: int, shares: dict[str, float]) -> None:
    for number in range(count):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture(number)))
    task = own_task(tmp_path, splits=shares)
    source = task_source(task)
    parts = split_parts(task, source)
    taken = [part.members(source, 0).tolist() for part in parts.values()]
    assert sorted(position for part in taken for position in part) == list(range(count))
    assert len(parts["test"].members(source, 0)) > 0
