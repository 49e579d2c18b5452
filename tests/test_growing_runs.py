"""Runs on a store that grows, as users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import TASKS, copy_store, write_experiment, write_images

import raytvb
from raytvb.cli.main import main
from raytvb.errors import UserError
from raytvb.experiment.parsing import load_experiment
from raytvb.experiment.stored import existing_basis, load_gram
from raytvb.experiment.stored_vectors import vectors_of
from raytvb.storage.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NEW = "glyphs/greek-fog"
SMALL: dict[str, Any] = {
    "basis": {"method": ["ae-anchored", "svd"], "online": True},
    "search": {"sizes": [1], "shares": [1.0]},
}


def run(file: Path, *options: str) -> int:
    return main(["run", str(file), *options])


def stamps(store: Store, *folders: str) -> dict[str, int]:
    """When each file of some folders was written."""
    found = {}
    for folder in folders:
        for key in store.keys(folder):
            found[key] = os.stat(store.path(key)).st_mtime_ns
    return found


@pytest.fixture
def store(finished: tuple[Path, Store], tmp_path: Path) -> Store:
    """A copy of a finished store."""
    return copy_store(finished[1], tmp_path / "store")


def test_one_task_more_makes_what_is_new_and_equals_a_run_on_all(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [TASKS[0], NEW, *TASKS[1:]]
    file = write_experiment(tmp_path, store.url, tasks=tasks)
    before = stamps(store, "vectors", "masks", "evals/negation-full", "base", "heads")
    assert main(["plan", str(file)]) == 0
    assert f"run       4 task vectors: 3 kept, 1 new ({NEW})" in capsys.readouterr().out
    assert stamps(store, "vectors", "masks", "evals/negation-full", "base", "heads") == before
    assert run(file) == 0
    shown = capsys.readouterr()
    assert f"4 task vectors: 3 kept, 1 new ({NEW})" in shown.err
    assert "it was not scored on glyphs/greek-fog" in shown.err
    assert "finetune 1/1  glyphs/greek-fog: loss" in shown.err
    assert "% of its own entries of lowest sensitivity" in shown.err
    after = stamps(store, "vectors", "masks", "evals/negation-full", "base", "heads")
    assert {key: after[key] for key in before} == before
    assert "all 4" in shown.out and main(["verify", store.url]) == 0
    summary = store.read_json("report/summary.json")
    assert summary["tasks"] == tasks
    assert all(len(entry["per_task"]) == 4 for entry in summary["addition"].values())

    fresh = Store(str(tmp_path / "fresh"))
    for key in ("mask.safetensors", "record.json"):
        store.download(f"masks/shared/{key}", fresh.path(f"masks/shared/{key}"))
    other = write_experiment(tmp_path / "other", fresh.url, tasks=tasks)
    assert run(other) == 0
    grown, whole = load_experiment(file), load_experiment(other)
    for task in tasks:
        checksums = [vectors_of(asked, [task])[task].checksum for asked in (grown, whole)]
        assert checksums[0] == checksums[1]
    grams = load_gram(store, grown), load_gram(fresh, whole)
    assert grams[0] is not None and grams[1] is not None and torch.equal(grams[0], grams[1])
    for name in ("svd-m1", "svd-m2", "ae-anchored-m1", "ae-anchored-m2"):
        versions = existing_basis(store, name), existing_basis(fresh, name)
        assert versions[0].checksum == versions[1].checksum
        rows = [torch.cat([r for _, r in v.vectors().blocks()], dim=1) for v in versions]
        assert torch.equal(rows[0], rows[1])
    again = fresh.read_json("report/summary.json")
    assert without_bytes(summary) == without_bytes(again)


def without_bytes(summary: dict[str, Any]) -> dict[str, Any]:
    """The accuracies and choices of a summary. The files of a basis that was made again have longer
    names, which its index lists."""
    keys = ("zero_shot", "fine_tuned", "negation", "negation_basis", "chosen")
    results = {key: summary[key] for key in keys}
    results["addition"] = {name: dict(entry) for name, entry in summary["addition"].items()}
    results["chosen"] = dict(results["chosen"])
    for entry in (*results["addition"].values(), results["chosen"]):
        del entry["stored_bytes"]
    return results


def test_a_task_is_redone_after_a_question_and_leaves_and_comes_back(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    redone = {"name": TASKS[1], "lr": 0.001, "seed": 5}
    file = write_experiment(tmp_path, store.url, tasks=[TASKS[0], redone, TASKS[2]])
    before = stamps(store, "vectors")
    assert run(file) == 1
    message = capsys.readouterr().err
    assert "1 task vector will be made again" in message and "Say `--yes`" in message
    assert f"{TASKS[1]}: finetune.lr: stored 0.006, asked for 0.001" in message
    assert stamps(store, "vectors") == before
    with pytest.raises(UserError, match="replace=True"):
        raytvb.run(raytvb.load_experiment(file))
    out = str(tmp_path / "out")
    assert main(["report", str(file)]) in (1, 3)
    assert "asked for 0.001" in capsys.readouterr().err
    assert run(file, "--yes") == 0
    after = stamps(store, "vectors")
    kept = [key for key in before if not key.startswith(f"vectors/{TASKS[1]}/")]
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert f"vectors/{TASKS[1]}/vector.safetensors" not in after
    metrics = store.read_json(f"vectors/{TASKS[1]}/record.json")["metrics"]
    assert [made["reason"] for made in metrics["history"]] == [
        "new",
        "finetune.lr: stored 0.006, asked for 0.001; finetune.seed: stored 0, asked for 5",
    ]
    assert main(["verify", store.url]) == 0
    assert main(["merge", store.url, "--add", TASKS[1], "--basis", "full", "--out", out]) == 0

    fewer = write_experiment(tmp_path / "fewer", store.url, tasks=[TASKS[0], TASKS[2]])
    capsys.readouterr()
    assert run(fewer) == 0
    message = capsys.readouterr().err
    assert f"1 stored vectors are not in this experiment, and stay: {TASKS[1]}" in message
    assert stamps(store, "vectors") == after
    summary = store.read_json("report/summary.json")
    assert summary["tasks"] == [TASKS[0], TASKS[2]]
    assert main(["verify", store.url]) == 0
    assert run(file) == 0 and stamps(store, "vectors") == after
    assert "finetune 1/" not in capsys.readouterr().err


def test_the_mask_is_made_anew_only_on_request(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = write_experiment(tmp_path, store.url, talos={"images": 16, "rounds": 2})
    before = stamps(store, "vectors", "masks", "basis")
    assert run(changed) == 1
    message = capsys.readouterr().err
    assert "talos.images: stored 32, asked for 16" in message and "--renew mask" in message
    assert run(changed, "--renew", "mask") == 1
    message = capsys.readouterr().err
    assert "3 task vectors will be made again" in message and "is made anew" in message
    assert stamps(store, "vectors", "masks", "basis") == before
    assert run(changed, "--renew", "mask", "--yes") == 0
    masks = {key.split("/")[1] for key in store.keys("masks")}
    assert masks == {"shared", "shared-2"}
    present = store.read_json("masks/shared-2/record.json")["parents"]["mask"]
    for task in TASKS:
        assert store.read_json(f"vectors/{task}/record.json")["parents"]["mask"] == present
    assert main(["verify", store.url]) == 0
    capsys.readouterr()
    assert run(changed) == 0
    assert "3 kept" in capsys.readouterr().err
    out = str(tmp_path / "out")
    assert main(["merge", store.url, "--add", TASKS[0], "--basis", "svd-m2", "--out", out]) == 0


def test_a_renamed_task_and_other_data_under_the_same_name(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, source in (("one", "glyphs/clock-blur"), ("two", "glyphs/greek-fog")):
        for split, count in (("train", 160), ("test", 60)):
            write_images(tmp_path / folder / split, source, split, count)
    store = Store(str(tmp_path / "store"))
    settings: dict[str, Any] = {"evaluate": {"control": "none"}, **SMALL}

    def file(name: str, folder: str) -> Path:
        tasks = [TASKS[0], TASKS[1], {"name": name, "data": str(tmp_path / folder)}]
        return write_experiment(tmp_path, store.url, tasks=tasks, **settings)

    assert run(file("clocks", "one")) == 0
    before = stamps(store, "vectors")
    capsys.readouterr()
    assert run(file("dials", "one")) == 1
    message = capsys.readouterr().err
    assert "task dials has no vector, but clocks" in message and "call it clocks again" in message
    assert run(file("clocks", "two")) == 1
    message = capsys.readouterr().err
    assert f"clocks: task.data: stored '{tmp_path}/one', asked for '{tmp_path}/two'" in message
    assert stamps(store, "vectors") == before
    assert run(file("clocks", "two"), "--yes") == 0
    assert run(file("dials", "one"), "--yes") == 0
    assert set(store.keys("vectors")) > {"vectors/dials/vector.safetensors"}
    assert main(["verify", store.url]) == 0


def test_a_store_that_takes_vectors_from_another_one(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = Store(str(tmp_path / "mine"))
    before = stamps(store, "")
    tasks = [*TASKS, NEW]
    file = write_experiment(tmp_path, mine.url, vectors=store.url, tasks=tasks, **SMALL)
    assert run(file) == 0
    shown = capsys.readouterr()
    assert "3 kept, 1 new (glyphs/greek-fog), 3 of them in another store" in shown.err
    assert stamps(store, "") == before
    assert {key.rpartition("/")[0] for key in mine.keys("vectors")} == {f"vectors/{NEW}"}
    summary = mine.read_json("report/summary.json")
    assert summary["tasks"] == tasks and len(summary["fine_tuned"]) == 4
    assert main(["verify", mine.url]) == 0 and main(["verify", store.url]) == 0
    for options in (("--basis", "svd-m2"), ("--basis", "full"), ()):
        out = str(tmp_path / "-".join(("out", *options)))
        assert (
            main(["merge", mine.url, "--add", TASKS[0], "--add", NEW, *options, "--out", out]) == 0
        )
    assert run(file) == 0
    assert "4 kept" in capsys.readouterr().err
    other = [{"name": TASKS[0], "lr": 0.001}, *TASKS[1:]]
    changed = write_experiment(tmp_path, mine.url, vectors=store.url, tasks=other, **SMALL)
    assert run(changed, "--yes") == 1
    message = capsys.readouterr().err
    assert "was made with other settings" in message and "asked for 0.001" in message
    assert stamps(store, "") == before


def test_two_people_add_different_tasks_at_the_same_time(
    store: Store, tmp_path: Path, suite_cache: str
) -> None:
    """Each with a Ray of his own. Both tasks land; whoever is overtaken is told to run again."""
    others = ("glyphs/greek-fog", "glyphs/clock-fog")
    files = []
    for name in others:
        folder = tmp_path / name.replace("/", "-")
        tasks = [*TASKS, name]
        files.append(write_experiment(folder, store.url, name=folder.name, tasks=tasks))
    environment = {**os.environ, "RAYTVB_CACHE": suite_cache, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "raytvb", "run"]
    running = []
    for file in files:
        process = subprocess.Popen(
            [*command, str(file), "--num-cpus", "1"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
    outputs = [process.communicate(timeout=600)[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0 or "run this again" in output, output
        assert "Traceback" not in output
    for name in others:
        assert store.exists(f"vectors/{name}/record.json")
    every = write_experiment(tmp_path, store.url, tasks=[*TASKS, *others])
    before = stamps(store, "vectors")
    assert run(every) == 0
    assert stamps(store, "vectors") == before
    assert main(["verify", store.url]) == 0
    assert len(json.loads(store.read("report/summary.json"))["tasks"]) == 5
