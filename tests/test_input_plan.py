"""What `raytvb plan` says of the data, from the data."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_input_images import encoded, picture

from raytvb.cli.main import main
from raytvb.experiment.sections.model import ModelConfig
from raytvb.models.prompts import prompt_warnings
from raytvb.storage.store import Store


def write_images(folder: Path, counts: dict[str, int]) -> None:
    """Images with different pixels, in folders: their number by the path of the folder."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            seed = int.from_bytes(f"{name}{number}".encode()[-6:], "big")
            (folder / name / f"{number}.png").write_bytes(encoded(picture(seed)))


def plan(
    folder: Path, capsys: pytest.CaptureFixture[str], tasks: list[Any], *options: str, **fields: Any
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `raytvb plan`."""
    file = folder / "experiment.yaml"
    fields = {"store": str(folder / "store"), "evaluate": {"control": "none"}, **fields}
    file.write_text(yaml.safe_dump({"tasks": tasks, **fields}))
    code = main(["plan", str(file), *options])
    out, err = capsys.readouterr()
    return code, out, err


def own(folder: Path, **fields: Any) -> dict[str, Any]:
    return {"name": "own", "data": str(folder / "images"), **fields}


SPLITS = ("train", "val", "test")
TWO = {f"{split}/{name}": 2 for split in SPLITS for name in ("cat", "dog")}

WARNINGS: dict[str, tuple[dict[str, int], dict[str, Any], str]] = {
    "nothing": (TWO, {}, ""),
    "a class that test lacks": ({**TWO, "train/cow": 1, "val/cow": 1}, {}, "test is in class cow"),
    "two classes that train lacks": (
        {**TWO, "test/cow": 1, "test/pig": 1, "val/cow": 1, "val/pig": 1},
        {},
        "train is in 2 classes: cow, pig",
    ),
    "twins in lower case": (
        {**TWO, **{f"{split}/Cat": 1 for split in SPLITS}},
        {},
        "Cat = cat",
    ),
    "names for two classes that read the same": (
        TWO,
        {"classes": ["house cat", "house_cat"]},
        "house cat = house_cat",
    ),
    "names that differ behind the end of the prompt": (
        TWO,
        {"classes": ["very " * 90 + "old", "very " * 90 + "young"]},
        "cannot tell them apart",
    ),
    "names that differ at their end": (TWO, {"classes": ["cat one", "cat two"]}, ""),
}


@pytest.mark.parametrize(("counts", "fields", "warning"), WARNINGS.values(), ids=WARNINGS)
def test_a_warning(
    counts: dict[str, int],
    fields: dict[str, Any],
    warning: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_images(tmp_path / "images", counts)
    code, out, _ = plan(tmp_path, capsys, [own(tmp_path, **fields)], "--json")
    assert code == 0
    warnings = json.loads(out)["tasks"]["own"]["warnings"]
    if not warning:
        assert not [line for line in warnings if "same prompts" in line or "no image" in line]
    else:
        assert [line for line in warnings if warning in line]


def test_images_are_counted_by_class_and_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"train/cat": 7, "train/dog": 3, "val/cat": 1, "val/dog": 2, "test/cat": 4}
    write_images(tmp_path / "images", {**counts, "test/dog": 5, "extra/dog": 6})
    (tmp_path / "images" / "train" / "cat" / "broken.png").write_bytes(b"broken")
    code, out, _ = plan(tmp_path, capsys, [own(tmp_path), "glyphs/greek-blur"], "--json")
    assert code == 0
    tasks = json.loads(out)["tasks"]
    assert tasks["own"]["classes"] == {
        "cat": {"train": 7, "val": 1, "test": 4},
        "dog": {"train": 3, "val": 2, "test": 5},
    }
    assert tasks["own"]["left_out"] == {
        "images of an unknown format": 1,
        "in extra, which no split uses": 6,
    }
    greek = tasks["glyphs/greek-blur"]["classes"]
    assert sum(counts["train"] for counts in greek.values()) == 1280
    code, out, _ = plan(tmp_path, capsys, [own(tmp_path)])
    assert code == 0
    for line in ("train 10: cat 7, dog 3", "test 9: cat 4, dog 5", "1 images of an unknown format"):
        assert line in out


def test_shares_are_counted_as_they_are_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", {"cat": 30, "dog": 20})
    splits = {"val": 0.2, "test": 0.4}
    code, out, _ = plan(tmp_path, capsys, [own(tmp_path, splits=splits)], "--json")
    assert code == 0
    classes = json.loads(out)["tasks"]["own"]["classes"]
    for name, count in (("cat", 30), ("dog", 20)):
        assert sum(classes[name].values()) == count
    for split, count in (("train", 20), ("val", 10), ("test", 20)):
        assert classes["cat"][split] + classes["dog"][split] == count


def test_one_task_that_cannot_be_used_does_not_hide_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", TWO)
    tasks = [own(tmp_path), {"name": "gone", "data": str(tmp_path / "gone")}]
    code, out, err = plan(tmp_path, capsys, tasks, "--json")
    document = json.loads(out)
    assert code == 3 and list(document["tasks"]) == ["own"]
    assert list(document["failed"]) == ["gone"] and "gone" in document["failed"]["gone"]
    assert "gone: data:" in err


def test_many_tasks_are_planned_in_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit is far above what it takes; with work that grows as the square of the number of
    tasks, this took 92 seconds."""
    write_images(tmp_path / "images", TWO)
    tasks = [{**own(tmp_path), "name": f"task-{number}"} for number in range(2000)]
    start = time.monotonic()
    code, out, _ = plan(tmp_path, capsys, tasks, "--json")
    assert code == 0 and len(json.loads(out)["tasks"]) == 2000
    assert time.monotonic() - start < 30


def test_the_model_without_a_tokenizer_is_named() -> None:
    config = ModelConfig(name="local-dir:/nowhere")
    (warning,) = prompt_warnings(config, ["cat", "dog"], ["a {}."])
    assert "tokenizer" in warning and "nowhere" in warning


@pytest.mark.ray
def test_tasks_with_vectors_are_counted_too(
    finished: tuple[Path, Store], capsys: pytest.CaptureFixture[str]
) -> None:
    file, store = finished
    assert main(["plan", str(file), "--store", store.url, "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert tasks.keys() >= {key.split("/", 1)[1].rsplit("/", 1)[0] for key in vectors(store)}
    for task in tasks.values():
        assert all(counts["test"] > 0 for counts in task["classes"].values())


def vectors(store: Store) -> list[str]:
    return [key for key in store.keys("vectors") if key.endswith("vector.safetensors")]
